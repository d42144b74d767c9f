"""06 block by block: counts, AdaIN's statistics, growing, mixing, truncation, noise, averages, one training."""

import itertools
import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
from conftest import load_script, snapshot, unchanged

SMALL = dict(latent_dim=8, image_size=32, channels=1, width=32)
NEARLY = dict(rtol=1e-3, atol=1e-4)  # float32, with sums in another order


@pytest.fixture
def module():
    return load_script("06_stylegan_blocks")


@pytest.fixture
def generator(module):
    torch.manual_seed(0)
    return module.Generator(**SMALL)


@pytest.fixture
def discriminator(module):
    torch.manual_seed(0)
    return module.Discriminator(32, 1, 32)


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_counts_of_the_text(module):
    """Example 7: the mapping network as printed, the block as counted (erratum 30), AdaIN by hand."""
    assert count(module.MappingNetwork()) == 2_101_248 == 8 * (512 * 512 + 512)
    assert count(module.StyleGANGeneratorBlock(128, 64)) == 242_050
    assert count(module.AdaptiveInstanceNorm(64)) == 65_664 == 2 * (512 * 64 + 64)
    assert count(module.Generator(512, 32, 1, 256).blocks[3]) == 242_050, "at width 256 the last block is the text's"
    assert (module.MAPPING_RATE, module.NOISE_START, module.GROWTH) == (0.01, 0.1, 0.5)


@pytest.mark.parametrize("image_size, channels, width, expected", [
    (32, 1, 64, [64, 64, 32, 16]), (64, 3, 64, [64, 64, 32, 16, 8]), (128, 3, 32, [32, 32, 16, 8, 4, 2]),
    (32, 1, 256, [256, 256, 128, 64])])
def test_shapes_of_every_block(module, image_size, channels, width, expected):
    assert module.channels_at(image_size, width) == expected
    g = module.Generator(8, image_size=image_size, channels=channels, width=width)
    d = module.Discriminator(image_size=image_size, channels=channels, width=width)
    shapes = []
    for part in [*g.blocks, *d.blocks]:
        part.register_forward_hook(lambda part, inputs, output: shapes.append(tuple(output.shape[1:])))
    images = g(torch.randn(2, 8))
    assert images.shape == (2, channels, image_size, image_size)
    assert d(images).shape == (2, 1)
    ladder = [(c, 4 * 2**k, 4 * 2**k) for k, c in enumerate(expected)]
    assert shapes == ladder + [(c, size, size) for c, (_, size, _) in zip(expected, ladder)][-2::-1]
    for level in range(len(expected)):
        g.level = d.level = float(level)
        images = g(torch.randn(2, 8))
        assert images.shape == (2, channels, image_size, image_size) and d(images).shape == (2, 1)
        coarse = F.avg_pool2d(images, image_size // (4 * 2**level))
        torch.testing.assert_close(F.interpolate(coarse, image_size), images, **NEARLY)


def test_mapping_network(module):
    """8 times Linear and LeakyReLU 0.2, then BatchNorm; z is normalised first: its length does not matter."""
    network = module.MappingNetwork(16)
    assert [type(part).__name__.removeprefix("Parametrized") for part in network] == ["Linear", "LeakyReLU"] * 8 + ["BatchNorm1d"]
    assert {part.negative_slope for part in network if isinstance(part, nn.LeakyReLU)} == {0.2}
    z = torch.randn(5, 16)
    torch.testing.assert_close(network(z), network(7 * z))
    x = z / z.square().mean(1, keepdim=True).sqrt()
    for part in network:
        x = part(x)
    torch.testing.assert_close(network(z), x)


def test_w_of_different_z_differ(module):
    """Without the BatchNorm their cosine similarity is about 0.7; with it w has mean 0 and deviation 1, in eval mode from running values."""
    torch.manual_seed(0)
    network, z = module.MappingNetwork(64), torch.randn(512, 64)
    with torch.no_grad():
        before, w = nn.Sequential(*network)[:-1](F.normalize(z) * 8), network(z)
        torch.testing.assert_close(w, (before - before.mean(0)) / before.std(0, unbiased=False), rtol=1e-3, atol=1e-3)
        for _ in range(100):
            network(torch.randn(512, 64))
        still = network.eval()(z)
        assert torch.equal(network(z[:1]), network(z[:1])) and (still - w).abs().mean() < 0.1
    for sample, low, high in [(before, 0.5, 0.9), (w, -0.05, 0.05), (still, -0.05, 0.05)]:
        alike = F.normalize(sample) @ F.normalize(sample).T
        assert low < (alike.sum() - 512) / (512 * 511) < high


def test_runtime_weight_scaling(module):
    """ProGAN 4.1: outputs of unit size from N(0, 1) weights; Adam moves the unscaled weight."""
    torch.manual_seed(0)
    for layer, x, gain in [(nn.Linear(300, 400), torch.randn(500, 300), 1), (nn.Conv2d(40, 50, 3), torch.randn(20, 40, 12, 12), 2**0.5)]:
        names = [name for name, _ in layer.named_parameters()]
        before = count(layer)
        layer = module.scaled(layer, gain)
        assert count(layer) == before and len(list(layer.parameters())) == len(names)
        original = layer.parametrizations.weight.original.detach()
        assert original.std() == pytest.approx(1, abs=0.02) and not layer.bias.any()
        torch.testing.assert_close(layer.weight, original * gain / original[0].numel()**0.5)
        assert layer(x).detach().std() == pytest.approx(gain, rel=0.05)


@pytest.mark.parametrize("size", [4, 5, 16])
def test_adain_gives_the_statistics_of_the_style(module, size):
    """The output's mean is bias(w) and its deviation |1 + scale(w)|, per sample and channel, whatever the input's are."""
    torch.manual_seed(0)
    adain = module.AdaptiveInstanceNorm(6, 10).double()
    w = torch.randn(3, 10, dtype=torch.float64)
    x = torch.randn(3, 6, size, size, dtype=torch.float64) * torch.rand(3, 6, 1, 1) * 50 + 100 * torch.randn(3, 6, 1, 1)
    with torch.no_grad():
        y, plain = adain(x, w), adain(x, w * 0)
    scale, bias = adain.style_scale(w).detach(), adain.style_bias(w).detach()
    torch.testing.assert_close(y.mean((2, 3)), bias)
    torch.testing.assert_close(y.std((2, 3), unbiased=False), (1 + scale).abs(), rtol=1e-3, atol=1e-6)
    centred = x.numpy() - x.numpy().mean((2, 3), keepdims=True)
    expected = centred / np.sqrt((centred**2).mean((2, 3), keepdims=True) + 1e-5)
    torch.testing.assert_close(y, (1 + scale)[:, :, None, None] * torch.from_numpy(expected) + bias[:, :, None, None])
    assert plain.mean() == pytest.approx(0, abs=1e-6), "a zero style leaves the normalised input"
    assert plain.std((2, 3), unbiased=False).mean() == pytest.approx(1, rel=1e-3)


def test_block_in_the_order_of_the_listing(module):
    """conv, noise, AdaIN, LeakyReLU, twice; each with its own noise map and strength."""
    torch.manual_seed(0)
    block = module.StyleGANGeneratorBlock(3, 4, 6)
    with torch.no_grad():
        block.noise1.fill_(0.7), block.noise2.fill_(-0.4)
    x, w, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 6), torch.randn(2, 2, 8, 8)

    def adain(part, x):
        mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
        scale, bias = (F.linear(w, layer.weight, layer.bias)[:, :, None, None] for layer in (part.style_scale, part.style_bias))
        return (1 + scale) * (x - mean) / (variance + 1e-5).sqrt() + bias

    y = F.leaky_relu(adain(block.adain1, F.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1) + 0.7 * noise[:, :1]), 0.2)
    y = F.leaky_relu(adain(block.adain2, F.conv2d(y, block.conv2.weight, block.conv2.bias, padding=1) - 0.4 * noise[:, 1:]), 0.2)
    torch.testing.assert_close(block(x, w, noise), y)
    block(x, w, noise).square().sum().backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in (block.noise1, block.noise2))


def test_erratum_37_strength_zero_has_no_expected_gradient(module):
    """At strength 0 the noises n and -n pull in opposite directions, so that the mean over noises is zero."""
    torch.manual_seed(0)
    block = module.StyleGANGeneratorBlock(3, 4, 6).double()
    with torch.no_grad():
        block.noise1.zero_(), block.noise2.zero_()
    x, w, noise = (torch.randn(*shape, dtype=torch.float64) for shape in [(2, 3, 8, 8), (2, 6), (2, 2, 8, 8)])
    gradients = []
    for sign in (1, -1):
        gradients.append(torch.autograd.grad(block(x, w, sign * noise).sin().sum(), [block.noise1, block.noise2]))
    for plus, minus in zip(*gradients, strict=True):
        assert plus.abs() > 1e-3
        torch.testing.assert_close(plus, -minus)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ends_of_the_fade_in(generator, discriminator, k):
    """Just above level k - 1 generator and discriminator are those of k - 1; just below k those of k."""
    z = torch.randn(4, 8)
    images = {}
    for level in (k - 1.0, k - 1 + 1e-6, k - 0.5, k - 1e-6, float(k)):
        generator.level = discriminator.level = level
        with torch.no_grad():
            styles = generator.styles(z)
            image = generator.synthesis(styles, noise_seed=0)
            images[level] = image, discriminator(torch.linspace(-1, 1, 4 * 1024).view(4, 1, 32, 32).sin())
    (low, d_low), (start, d_start), (half, d_half), (end, d_end), (high, d_high) = images.values()
    torch.testing.assert_close(start, low, **NEARLY)
    torch.testing.assert_close(end, high, **NEARLY)
    torch.testing.assert_close(half, (low + high) / 2, **NEARLY)
    torch.testing.assert_close(d_start, d_low, **NEARLY)
    torch.testing.assert_close(d_end, d_high, **NEARLY)
    assert (low - high).abs().max() > 0.1 and not torch.allclose(d_half, d_low) and not torch.allclose(d_half, d_high)
    generator.level = k - 1.0
    small = F.interpolate(low, 4 * 2**(k - 1))
    torch.testing.assert_close(F.interpolate(small, scale_factor=2), F.interpolate(start, 4 * 2**k), **NEARLY)


def test_level_grows_by_standing_and_fading(module):
    """Half of the training at 4x4, to 8x8, 8x8, to 16x16, 16x16, to 32x32; the other half at 32x32."""
    levels = [module.level_at(twelfth / 12, 3) for twelfth in range(13)]
    assert levels == pytest.approx([0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3])
    assert module.level_at(1.25 / 12, 3) == pytest.approx(0.25) and module.level_at(3.5 / 12, 3) == pytest.approx(1.5)
    fine = [module.level_at(step / 1000, 3) for step in range(1001)]
    assert all(a <= b for a, b in itertools.pairwise(fine)) and fine[0] == 0 and fine[-1] == 3
    assert module.level_at(0.5, 5) == 5


def test_real_images_lose_detail_as_the_generator_does(module):
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(module.with_detail_of(3.0, images), images)
    means = [F.interpolate(F.avg_pool2d(images, 8 // 2**k), 32) for k in range(4)]
    for level, expected in [(0.0, means[0]), (1.0, means[1]), (2.0, means[2]), (0.25, 0.75 * means[0] + 0.25 * means[1])]:
        torch.testing.assert_close(module.with_detail_of(level, images), expected)


def test_minibatch_deviation(module, discriminator):
    """The last convolution sees one more channel: the mean over features and places of the deviation over the batch."""
    seen = []
    discriminator.last[0].register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    images = torch.randn(6, 1, 32, 32)
    discriminator(images), discriminator(images[:1].expand(6, -1, -1, -1))
    features, statistic = seen[0][:, :-1], seen[0][:, -1]
    assert statistic.unique().numel() == 1
    assert statistic[0, 0, 0].item() == pytest.approx(features.detach().numpy().std(0).mean(), rel=1e-4)
    assert seen[1][:, -1].max() < 1e-3, "a collapsed batch has none"


def test_r1_by_hand(module):
    """D(x) = sum(a x^2) / 2 has the gradient a x; and the penalty reaches D's weights."""
    a, x = torch.rand(1, 2, 3, 3, requires_grad=True), torch.randn(5, 2, 3, 3, requires_grad=True)
    penalty = module.r1_penalty((a * x * x / 2).sum((1, 2, 3)), x)
    torch.testing.assert_close(penalty, (a * x).square().flatten(1).sum(1).mean())
    gradient, = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(gradient, 2 * (a * x.square()).mean(0, keepdim=True))


def test_losses_against_probabilities(module):
    """softplus(-l) = -log sigmoid(l), in float64; at logits of -30 and 30 the gradients are whole."""
    real, fake = (torch.randn(7, 1, dtype=torch.float64) * 3 for _ in range(2))
    expected = -(real.sigmoid().log().mean() + (1 - fake.sigmoid()).log().mean())
    torch.testing.assert_close(module.discriminator_loss(real, fake), expected)
    torch.testing.assert_close(module.generator_loss(fake), -fake.sigmoid().log().mean())
    logit = torch.tensor([[-30.0]], requires_grad=True)
    assert torch.autograd.grad(module.generator_loss(logit), logit)[0].item() == pytest.approx(-1)


class Setting:
    def __init__(self, module, level):
        torch.manual_seed(0)
        self.module, self.generator, self.discriminator = module, module.Generator(**SMALL), module.Discriminator(32, 1, 32)
        self.generator.level = self.discriminator.level = level
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), 1e-3)
        self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), 1e-3)
        self.real, self.z = torch.randn(4, 1, 32, 32), torch.randn(4, 8)

    def discriminator_step(self, mixing=0.0, weight=3.0):
        return self.module.discriminator_step(self.generator, self.discriminator, self.optimizer_d, self.real, self.z, mixing, weight)

    def generator_step(self, mixing=0.0):
        return self.module.generator_step(self.generator, self.discriminator, self.optimizer_g, self.z, mixing)


@pytest.mark.parametrize("level", [0.0, 1.5, 3.0])
def test_steps_descend_their_losses_and_train_one_network_each(module, level):
    """Both losses and their gradients, written down anew; the other network keeps its parameters and gradients."""
    setting = Setting(module, level)
    g, d = setting.generator, setting.discriminator
    torch.manual_seed(5), torch.rand(()) if level > 0 else None
    fake = g.synthesis(g.styles(setting.z)).detach()
    real = module.with_detail_of(level, setting.real).requires_grad_()
    slope, = torch.autograd.grad(d(real).sum(), real, create_graph=True)
    r1, d_real, d_fake = (slope**2).flatten(1).sum(1).mean(), d(real).sigmoid().mean(), d(fake).sigmoid().mean()
    expected = -(d(real).sigmoid().log().mean() + (1 - d(fake).sigmoid()).log().mean()) + 3 / 2 * r1
    gradients = torch.autograd.grad(expected, list(d.parameters()), allow_unused=True)
    before, kept = snapshot(d.named_parameters()), snapshot(g.named_parameters())
    torch.manual_seed(5)
    found = setting.discriminator_step()
    torch.testing.assert_close(found, {"D(x)": d_real, "D(G(z))": d_fake, "r1": r1, "loss_D": expected})
    assert unchanged(kept, dict(g.named_parameters())) and all(part.grad is None for part in g.parameters())
    for gradient, (name, part) in zip(gradients, d.named_parameters(), strict=True):
        if gradient is None:
            assert part.grad is None and torch.equal(before[name], part), f"{name} is not in use at this level"
        else:
            torch.testing.assert_close(part.grad, gradient, rtol=1e-3, atol=1e-5)
            assert not torch.equal(before[name], part), name
    unused = {name.split(".")[1] for name, gradient in zip(before, gradients, strict=True) if gradient is None and name.startswith("blocks")}
    assert unused == {str(k) for k in range(math.ceil(level), 3)}

    torch.manual_seed(6), torch.rand(()) if level > 0 else None
    expected = -d(g.synthesis(g.styles(setting.z))).sigmoid().log().mean()
    gradients = torch.autograd.grad(expected, list(g.parameters()), allow_unused=True)
    before, kept = snapshot(g.named_parameters()), snapshot(d.named_parameters())
    torch.manual_seed(6)
    torch.testing.assert_close(setting.generator_step()["loss_G"], expected)
    assert unchanged(kept, dict(d.named_parameters()))
    for gradient, (name, part) in zip(gradients, g.named_parameters(), strict=True):
        if gradient is None:
            assert part.grad is None and torch.equal(before[name], part), f"{name} is not in use at this level"
        else:
            torch.testing.assert_close(part.grad, gradient, rtol=1e-3, atol=1e-5)
    unused = {name.split(".")[1] for name, gradient in zip(before, gradients, strict=True) if gradient is None and name.startswith("blocks")}
    assert unused == {str(k) for k in range(math.ceil(level) + 1, 4)}


@pytest.mark.parametrize("level, crossings", [(0.0, set()), (1.0, {1}), (1.5, {1, 2}), (3.0, {1, 2, 3})])
def test_mixing_regularisation(module, generator, level, crossings):
    """With probability p: z's own styles up to a random block in use, from there those of another z."""
    generator.level = level
    z = torch.randn(3, 8)
    own = generator.styles(z)
    assert torch.equal(module.mixed_styles(generator, z, 0.0), own)
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        styles = module.mixed_styles(generator, z, 1.0)
        same = (styles == own).all(2)
        assert torch.equal(same, same[:1].expand(3, -1)), "one crossing for all"
        seen.add(int(same[0].sum()))
        assert same[0].tolist() == sorted(same[0].tolist(), reverse=True)
        foreign = styles[:, -1:].expand_as(styles)
        assert torch.equal(styles[~same], foreign[~same])
    assert seen - {4} == crossings and (4 in seen) == (not crossings)
    torch.manual_seed(0)
    mixed = sum(not torch.equal(module.mixed_styles(generator, z, 0.3), own) for _ in range(400)) / 400
    assert mixed == pytest.approx(0.3 if crossings else 0, abs=0.07)


@pytest.mark.parametrize("crossing", [0, 1, 2, 3, 4])
def test_mixing_at_each_crossing(module, generator, crossing):
    """Cell (b, a): blocks before the crossing under the style of a, the others of b; at 0 it is b, at 4 it is a."""
    generator.eval()
    z_a, z_b = torch.randn(3, 8), torch.randn(2, 8)
    images = module.mix(generator, z_a, z_b, crossing)
    assert images.shape == (2, 3, 1, 32, 32)
    for row in range(2):
        for column in range(3):
            w_a, w_b = generator.mapping(z_a)[column], generator.mapping(z_b)[row]
            styles = torch.stack([w_a] * crossing + [w_b] * (4 - crossing))[None]
            with torch.no_grad():
                torch.testing.assert_close(images[row, column], generator.synthesis(styles, noise_seed=0)[0], **NEARLY)
    with torch.no_grad():
        if crossing in (0, 4):
            own = generator(z_b)[:, None].expand(-1, 3, -1, -1, -1) if crossing == 0 else generator(z_a)[None].expand(2, -1, -1, -1, -1)
            torch.testing.assert_close(images, own, **NEARLY)


def test_truncation(module, generator):
    """psi 1 is the sample, psi 0 the mean style whatever z, in between the styles lie on a line."""
    generator.eval()
    z = torch.randn(4, 8)
    with torch.no_grad():
        torch.testing.assert_close(module.truncate(generator, z, 1.0), generator(z), **NEARLY)
        mean = module.truncate(generator, z, 0.0)
        torch.testing.assert_close(mean, mean[:1].expand(4, -1, -1, -1), **NEARLY)
        half = generator.mapping(z) / 2
        torch.testing.assert_close(module.truncate(generator, z, 0.5), generator.synthesis(half[:, None].expand(-1, 4, -1), 0), **NEARLY)


def test_noise(module, generator):
    """New for each sample and call in training; from a seed in eval mode and the same for all samples."""
    z = torch.randn(1, 8).expand(2, -1)
    with torch.no_grad():
        first, second = generator(z)
        assert not torch.equal(first, second)
        generator.eval()
        images = module.renoise(generator, z, 3)
        assert images.shape == (2, 3, 1, 32, 32) and not torch.equal(images[0, 0], images[0, 1])
        torch.testing.assert_close(images[0], images[1], **NEARLY)
        random = torch.get_rng_state()
        torch.testing.assert_close(generator(z), images[:, 0], **NEARLY)
        assert torch.equal(random, torch.get_rng_state())
        for block in generator.blocks:
            block.noise1.zero_(), block.noise2.zero_()
        still = module.renoise(generator, z, 2)
        assert torch.equal(still[:, 0], still[:, 1])


def test_average(module, generator):
    average = module.Generator(**SMALL)
    average.load_state_dict(generator.state_dict())
    before = snapshot(average.state_dict().items())
    with torch.no_grad():
        for part in [*generator.parameters(), *generator.buffers()]:
            part += 1
    common.update_average(average, generator, 0.998, 10_000)
    for name, value in average.state_dict().items():
        if value.is_floating_point() and not name.endswith("extra_state"):
            torch.testing.assert_close(value, before[name] + 1 - 0.998)
    generator.level = 1.5
    common.update_average(average, generator, 0.998, 10_001)
    assert average.level == 1.5


def test_learning_rates_fall_each_from_its_own(module, tmp_path, monkeypatch):
    rates = []
    step = module.generator_step
    monkeypatch.setattr(module, "generator_step", lambda generator, discriminator, optimizer, *rest: (
        rates.append([group["lr"] for group in optimizer.param_groups]), step(generator, discriminator, optimizer, *rest))[1])
    monkeypatch.setattr(common.Run, "_final_pictures", lambda run: None)
    module.main(["--dataset", "digits", "--epochs", "1", "--max-batches", "4", "--batch-size", "4", "--width", "32", "--latent-dim", "8",
                 "--lr-decay", "1", "--device", "cpu", "--eval-interval", "0", "--output-dir", str(tmp_path)])
    assert [fast for fast, _ in rates] == pytest.approx([share * module.CONSTANTS["stylegan"]["lr_g"] for share in (1, 0.75, 0.5, 0.25)])
    assert [slow for _, slow in rates] == pytest.approx([module.MAPPING_RATE * fast for fast, _ in rates])


def test_level_is_part_of_the_state(module, generator):
    generator.level = 1.25
    other = module.Generator(**SMALL)
    other.load_state_dict(generator.state_dict())
    assert other.level == 1.25


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny training on drawn digits and its folder."""
    parent = tmp_path_factory.mktemp("runs")
    load_script("06_stylegan_blocks").main(["--dataset", "digits", "--epochs", "4", "--max-batches", "2", "--batch-size", "4",
                                            "--width", "32", "--latent-dim", "8", "--device", "cpu", "--eval-interval", "0",
                                            "--output-dir", str(parent)])
    return parent / "06_stylegan_blocks-digits-0001"


def test_training_grows_and_averages(run, module):
    levels = [json.loads(line)["level"] for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [module.level_at((step + 1) / 8, 3) for step in range(8)]
    assert levels == pytest.approx([(a + b) / 2 for a, b in zip(steps[::2], steps[1::2])]) and levels[0] < levels[-1] == 3
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert {"generator", "average", "discriminator", "optimizer_g", "optimizer_d"} < set(checkpoint)
    for name, network in (("optimizer_g", module.Generator(**SMALL)), ("optimizer_d", module.Discriminator(32, 1, 32))):
        assert len(checkpoint[name]["state"]) == len(list(network.parameters())), "every part of both was trained"
    torch.manual_seed(0)
    start, trained, average = module.Generator(**SMALL).constant, checkpoint["generator"]["constant"], checkpoint["average"]["constant"]
    way = (average - start).norm() / (trained - start).norm()
    assert 0.2 < way < 0.9, "the average follows"
    fast, slow = checkpoint["optimizer_g"]["param_groups"]
    rate = module.CONSTANTS["stylegan"]["lr_g"]
    assert (fast["lr"], slow["lr"]) == (rate, rate * module.MAPPING_RATE) and len(slow["params"]) == 16
    assert tuple(fast["betas"]) == (0.0, 0.99)


def test_style_pictures_of_the_run_and_of_from(run, module):
    """--from RUN --styles repeats what the training drew; the generator that draws is the average."""
    names = ["style_mixing", "truncation", "noise"]
    for name in names:
        assert len(np.unique(picture(run / "samples" / f"{name}.png"))) > 20
    module.main(["--device", "cpu", "--from", str(run), "--styles"])
    for name in names:
        assert np.array_equal(picture(run / "samples" / f"{name}.png"), picture(run / "samples" / f"{name}-seed0.png"))
    module.main(["--device", "cpu", "--from", str(run), "--styles", "--seed", "1"])
    assert not np.array_equal(picture(run / "samples" / "style_mixing.png"), picture(run / "samples" / "style_mixing-seed1.png"))


def test_layout_of_the_style_pictures(module, generator, monkeypatch, tmp_path):
    drawn = []
    generator.eval()
    monkeypatch.setattr(common, "save_panels", lambda panels, path: drawn.append(panels))
    pipeline = common.Pipeline(generator, module.generate_noise, Namespace(latent_dim=8, classes=0, seed=3, dataset="digits"))
    for draw in module.STYLES.values():
        draw(pipeline, path=tmp_path)
    mixing, truncation, noise = drawn
    z = pipeline.noise(12)
    own = pipeline(z, torch.zeros(12))
    assert list(mixing) == ["A (top) to 4x4, B (left) from 8x8 on", "A (top) to 8x8, B (left) from 16x16 on",
                            "A (top) to 16x16, B (left) from 32x32 on"]
    for crossing, (images, columns) in enumerate(mixing.values(), start=1):
        grid = images.unflatten(0, (6, columns))
        assert columns == 8 and (grid[0, 0] == 1).all()
        torch.testing.assert_close(grid[0, 1:], own[:7], **NEARLY)
        torch.testing.assert_close(grid[1:, 0], own[7:], **NEARLY)
        torch.testing.assert_close(grid[1:, 1:], module.mix(generator, z[:7], z[7:], crossing), **NEARLY)
    (images, columns), = truncation.values()
    grid = images.unflatten(0, (8, columns))
    assert columns == 11
    torch.testing.assert_close(grid[:, 10], pipeline(pipeline.noise(8), torch.zeros(8)), **NEARLY)
    torch.testing.assert_close(grid[:, 0], grid[:1, 0].expand(8, -1, -1, -1), **NEARLY)
    (images, columns), = noise.values()
    grid, expected = images.unflatten(0, (6, columns)), module.renoise(generator, pipeline.noise(6), 100)
    assert columns == 9
    torch.testing.assert_close(grid[:, :8], expected[:, :8], **NEARLY)
    deviation = expected.numpy().std(1, ddof=1)
    torch.testing.assert_close(grid[:, 8], torch.from_numpy(deviation / deviation.max() * 2 - 1), rtol=1e-2, atol=1e-2)


def test_interrupted_while_small(run, module, tmp_path, capsys):
    """What a run stopped at 4x4 cannot show is refused in one line; at 8x8 one crossing is left."""
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    for level, panels in [(0.0, 0), (0.5, 1)]:
        checkpoint["average"]["_extra_state"] = torch.tensor(level, dtype=torch.float64)
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        if panels:
            module.main(["--from", str(tmp_path), "--styles"])
            assert picture(tmp_path / "samples" / "style_mixing-seed0.png").shape[1] < 800
        else:
            with pytest.raises(SystemExit) as stop:
                module.main(["--from", str(tmp_path), "--styles"])
            assert stop.value.code == 2 and "interrupted at its first, 4x4" in capsys.readouterr().err
