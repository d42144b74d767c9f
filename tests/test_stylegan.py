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


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_counts_of_the_text(module):
    """実装例7: the mapping network as printed, the block as counted (erratum 30), AdaIN by hand."""
    assert count(module.MappingNetwork()) == 2_101_248 == 8 * (512 * 512 + 512)
    assert count(module.StyleGANGeneratorBlock(128, 64)) == 242_050
    assert count(module.AdaptiveInstanceNorm(64)) == 65_664 == 2 * (512 * 64 + 64)
    assert count(module.Generator(512, 32, 1, 256).blocks[3]) == 242_050, "at width 256 the last block is the text's"


@pytest.mark.parametrize("image_size, channels, width, expected", [(32, 1, 64, [64, 64, 32, 16]),
                                                                   (128, 3, 32, [32, 32, 16, 8, 4, 2])])
def test_shapes_of_every_block(module, image_size, channels, width, expected):
    """At full size; and at each lower level the images are of fewer pixels, enlarged."""
    g, d = module.Generator(8, image_size, channels, width), module.Discriminator(image_size, channels, width)
    shapes = []
    for part in [*g.blocks, *d.blocks]:
        part.register_forward_hook(lambda part, inputs, output: shapes.append(tuple(output.shape[1:])))
    assert d(g(torch.randn(2, 8))).shape == (2, 1)
    ladder = [(c, 4 * 2**k, 4 * 2**k) for k, c in enumerate(expected)]
    assert shapes == ladder + [(c, size, size) for c, (_, size, _) in zip(expected, ladder)][-2::-1]
    for level in range(len(expected)):
        g.level = d.level = float(level)
        images = g(torch.randn(2, 8))
        assert images.shape == (2, channels, image_size, image_size) and d(images).shape == (2, 1)
        coarse = F.avg_pool2d(images, image_size // (4 * 2**level))
        torch.testing.assert_close(F.interpolate(coarse, image_size), images, **NEARLY)


def test_mapping_network(module):
    """8 times Linear and LeakyReLU 0.2, then BatchNorm, without which the w of different z are alike; z normalised."""
    torch.manual_seed(0)
    network, z = module.MappingNetwork(64), torch.randn(512, 64)
    names = [type(part).__name__.removeprefix("Parametrized") for part in network]
    assert names == ["Linear", "LeakyReLU"] * 8 + ["BatchNorm1d"]
    assert {part.negative_slope for part in network if isinstance(part, nn.LeakyReLU)} == {0.2}
    with torch.no_grad():
        before, w = nn.Sequential(*network)[:-1](z / z.square().mean(1, keepdim=True).sqrt()), network(7 * z)
        torch.testing.assert_close(w, (before - before.mean(0)) / before.std(0, unbiased=False), rtol=1e-3, atol=1e-3)
        for _ in range(100):
            network(torch.randn(512, 64))
        still = network.eval()(z)
        assert (still - w).abs().mean() < 0.1, "in eval mode from running values"
    for sample, low, high in [(before, 0.5, 0.9), (still, -0.05, 0.05)]:
        alike = F.normalize(sample) @ F.normalize(sample).T
        assert low < (alike.sum() - 512) / (512 * 511) < high


def test_runtime_weight_scaling(module):
    """ProGAN 4.1: outputs of unit size from N(0, 1) weights; Adam moves the unscaled weight."""
    torch.manual_seed(0)
    for layer, x, gain in [(nn.Linear(300, 400), torch.randn(500, 300), 1),
                           (nn.Conv2d(40, 50, 3), torch.randn(20, 40, 12, 12), 2**0.5)]:
        layer = module.scaled(layer, gain)
        original = layer.parametrizations.weight.original.detach()
        assert original.std() == pytest.approx(1, abs=0.02) and not layer.bias.any()
        torch.testing.assert_close(layer.weight, original * gain / original[0].numel()**0.5)
        assert layer(x).detach().std() == pytest.approx(gain, rel=0.05)


def test_block_in_the_order_of_the_listing(module):
    """conv, noise, AdaIN, LeakyReLU, twice; each with its own noise map and strength."""
    torch.manual_seed(0)
    block = module.StyleGANGeneratorBlock(3, 4, 6)
    assert block.noise1.item() == block.noise2.item() == pytest.approx(0.1)
    with torch.no_grad():
        block.noise1.fill_(0.7), block.noise2.fill_(-0.4)
    x, w, noise = torch.randn(2, 3, 8, 8), torch.randn(2, 6), torch.randn(2, 2, 8, 8)

    def adain(part, x):
        mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
        scale, bias = (F.linear(w, layer.weight, layer.bias)[:, :, None, None]
                       for layer in (part.style_scale, part.style_bias))
        return (1 + scale) * (x - mean) / (variance + 1e-5).sqrt() + bias

    y = F.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1) + 0.7 * noise[:, :1]
    y = F.leaky_relu(adain(block.adain1, y), 0.2)
    y = F.conv2d(y, block.conv2.weight, block.conv2.bias, padding=1) - 0.4 * noise[:, 1:]
    torch.testing.assert_close(block(x, w, noise), F.leaky_relu(adain(block.adain2, y), 0.2))
    block(x, w, noise).square().sum().backward()
    assert all(part.grad.abs().sum() > 0 for part in (block.noise1, block.noise2))


def test_erratum_37_strength_zero_has_no_expected_gradient(module):
    """At strength 0 the noises n and -n pull in opposite directions, so that the mean over noises is zero."""
    torch.manual_seed(0)
    block = module.StyleGANGeneratorBlock(3, 4, 6).double()
    strengths = [nn.init.zeros_(block.noise1), nn.init.zeros_(block.noise2)]
    x, w, noise = (torch.randn(*shape, dtype=torch.float64) for shape in [(2, 3, 8, 8), (2, 6), (2, 2, 8, 8)])
    plus, minus = (torch.cat(torch.autograd.grad(block(x, w, n).sin().sum(), strengths)) for n in (noise, -noise))
    assert plus.abs().min() > 1e-3
    torch.testing.assert_close(plus, -minus)


def test_minibatch_deviation(module):
    """The last convolution sees one more channel: the mean deviation of the features over the batch."""
    seen, discriminator = [], module.Discriminator(32, 1, 32)
    discriminator.last[0].register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].detach()))
    discriminator(torch.randn(6, 1, 32, 32))
    features, statistic = seen[0][:, :-1], seen[0][:, -1]
    assert statistic.unique().numel() == 1
    assert statistic[0, 0, 0].item() == pytest.approx(features.numpy().std(0).mean(), rel=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_ends_of_the_fade_in(module, generator, k):
    """Just above level k - 1 generator and discriminator are those of k - 1; just below k those of k."""
    discriminator, images, scores = module.Discriminator(32, 1, 32), [], []
    z, real = torch.randn(4, 8), torch.linspace(-1, 1, 4096).view(4, 1, 32, 32).sin()
    for level in (k - 1.0, k - 1 + 1e-6, k - 0.5, k - 1e-6, float(k)):
        generator.level = discriminator.level = level
        with torch.no_grad():
            images.append(generator.synthesis(generator.styles(z), noise_seed=0))
            scores.append(discriminator(real))
    for low, start, half, end, high in (images, scores):
        torch.testing.assert_close(start, low, **NEARLY)
        torch.testing.assert_close(end, high, **NEARLY)
        assert not torch.allclose(half, low, **NEARLY) and not torch.allclose(half, high, **NEARLY)
    torch.testing.assert_close(images[2], (images[0] + images[4]) / 2, **NEARLY)


def test_level_grows_by_standing_and_fading(module):
    """Half of the training at 4x4, to 8x8, 8x8, to 16x16, 16x16, to 32x32; the other half at 32x32."""
    levels = [module.level_at(twelfth / 12, 3) for twelfth in range(13)]
    assert levels == pytest.approx([0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3])
    assert module.level_at(1.25 / 12, 3) == pytest.approx(0.25) and module.level_at(3.5 / 12, 3) == pytest.approx(1.5)
    assert module.level_at(0.5, 5) == 5


def test_real_images_lose_detail_as_the_generator_does(module):
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(module.with_detail_of(3.0, images), images)
    at4, at8 = (F.interpolate(F.avg_pool2d(images, size), 32) for size in (8, 4))
    for level, expected in [(0.0, at4), (1.0, at8), (0.25, 0.75 * at4 + 0.25 * at8)]:
        torch.testing.assert_close(module.with_detail_of(level, images), expected)


def test_average_of_weights_buffers_and_level(module, generator):
    average = module.Generator(**SMALL)
    average.load_state_dict(generator.state_dict())
    before = snapshot(average.state_dict().items())
    with torch.no_grad():
        for part in [*generator.parameters(), *generator.buffers()]:
            part += 1
    generator.level = 1.5
    common.update_average(average, generator, 0.998, 10_000)
    for name, value in average.state_dict().items():
        if value.is_floating_point() and not name.endswith("extra_state"):
            torch.testing.assert_close(value, before[name] + 1 - 0.998)
    assert average.level == 1.5


def check_step(step, expected, network, other, unused):
    """The step returns `expected`, descends the gradient of its last entry, and leaves the other network alone.

    unused: of the network's blocks, which are not in use at this level and stay as they are.
    """
    gradients = torch.autograd.grad([*expected.values()][-1], list(network.parameters()), allow_unused=True)
    before, kept = snapshot(network.named_parameters()), snapshot(other.named_parameters())
    torch.manual_seed(5)
    torch.testing.assert_close(step(), expected)
    assert unchanged(kept, dict(other.named_parameters()))
    still = set()
    for gradient, (name, part) in zip(gradients, network.named_parameters(), strict=True):
        if gradient is None:
            assert part.grad is None and torch.equal(before[name], part), name
            still |= {int(name.split(".")[1])} if name.startswith("blocks") else set()
        else:
            torch.testing.assert_close(part.grad, gradient, rtol=1e-3, atol=1e-5)
    assert still == set(unused)


@pytest.mark.parametrize("level", [0.0, 1.5])
def test_steps_descend_their_losses_and_train_one_network_each(module, generator, level):
    """Both losses and their gradients, written down anew, without mixing of styles."""
    g, d, top = generator, module.Discriminator(32, 1, 32), math.ceil(level)
    g.level = d.level = level
    optimizer_g, optimizer_d = (torch.optim.Adam(network.parameters(), 1e-3) for network in (g, d))
    images, z = torch.randn(4, 1, 32, 32), torch.randn(4, 8)

    def fake():
        torch.manual_seed(5), torch.rand(()) if level > 0 else None  # whether to mix
        return g.synthesis(g.styles(z))

    real, generated = module.with_detail_of(level, images).requires_grad_(), fake().detach()
    slope, = torch.autograd.grad(d(real).sum(), real, create_graph=True)
    r1, d_real, d_fake = (slope**2).flatten(1).sum(1).mean(), d(real).sigmoid(), d(generated).sigmoid()
    loss = -(d_real.log().mean() + (1 - d_fake).log().mean()) + 3 / 2 * r1
    expected = {"D(x)": d_real.mean(), "D(G(z))": d_fake.mean(), "r1": r1, "loss_D": loss}
    check_step(lambda: module.discriminator_step(g, d, optimizer_d, images, z, 0.0, 3.0), expected, d, g, range(top, 3))
    assert all(part.grad is None for part in g.parameters())
    expected = {"loss_G": -d(fake()).sigmoid().log().mean()}
    check_step(lambda: module.generator_step(g, d, optimizer_g, z, 0.0), expected, g, d, range(top + 1, 4))


@pytest.mark.parametrize("level, crossings", [(0.0, {4}), (1.5, {1, 2}), (3.0, {1, 2, 3})])
def test_mixing_regularisation(module, generator, level, crossings):
    """With probability p: z's own styles up to a random block in use, from there those of another z."""
    generator.level, z, seen = level, torch.randn(3, 8), set()
    own = generator.styles(z)
    for seed in range(25):
        torch.manual_seed(seed)
        styles = module.mixed_styles(generator, z, 1.0)
        same = (styles == own).all(2)
        crossing = int(same[0].sum())
        assert torch.equal(same, (torch.arange(4) < crossing).expand(3, -1)), "one crossing for all"
        assert torch.equal(styles[:, crossing:], styles[:, -1:].expand(-1, 4 - crossing, -1)), "of one other z"
        seen.add(crossing)
    assert seen == crossings
    torch.manual_seed(0)
    mixed = sum(not torch.equal(module.mixed_styles(generator, z, 0.3), own) for _ in range(200)) / 200
    assert mixed == pytest.approx(0.3 if level else 0, abs=0.07)


@pytest.mark.parametrize("crossing", [0, 1, 4])
@torch.no_grad()
def test_mixing_at_each_crossing(module, generator, crossing):
    """Cell (b, a): blocks before the crossing under the style of a, the others of b; at 0 it is b, at 4 it is a."""
    generator.eval()
    z_a, z_b = torch.randn(3, 8), torch.randn(2, 8)
    images = module.mix(generator, z_a, z_b, crossing)
    assert images.shape == (2, 3, 1, 32, 32)
    for row, column in itertools.product(range(2), range(3)):
        w_a, w_b = generator.mapping(z_a)[column], generator.mapping(z_b)[row]
        styles = torch.stack([w_a] * crossing + [w_b] * (4 - crossing))[None]
        torch.testing.assert_close(images[row, column], generator.synthesis(styles, noise_seed=0)[0], **NEARLY)


@torch.no_grad()
def test_noise(module, generator):
    """New for each sample and call in training; from a seed in eval mode and the same for all samples."""
    z = torch.randn(1, 8).expand(2, -1)
    first, second = generator(z)
    assert not torch.equal(first, second)
    generator.eval()
    images, random = module.renoise(generator, z, 3), torch.get_rng_state()
    assert images.shape == (2, 3, 1, 32, 32) and not torch.equal(images[0, 0], images[0, 1])
    torch.testing.assert_close(images[0], images[1], **NEARLY)
    torch.testing.assert_close(generator(z), images[:, 0], **NEARLY)
    assert torch.equal(random, torch.get_rng_state())


def test_layout_of_the_style_pictures(module, generator, monkeypatch, tmp_path):
    drawn = []
    generator.eval()
    monkeypatch.setattr(common, "save_picture", lambda images, columns, path, title: drawn.append(
        images.unflatten(0, (-1, columns))))
    args = Namespace(latent_dim=8, classes=0, seed=3, dataset="digits")
    pipeline = common.Pipeline(generator, module.generate_noise, args)
    for draw in module.STYLES.values():
        draw(pipeline, tmp_path)
    mixing, truncation, noise = drawn
    assert mixing.shape[:2] == (6, 24) and truncation.shape[:2] == (8, 11) and noise.shape[:2] == (6, 9)
    z = pipeline.noise(12)
    own = pipeline(z, torch.zeros(12))
    for crossing, panel in enumerate(mixing.split(8, 1), start=1):
        assert (panel[0, 0] == 1).all(), "the corner is white"
        torch.testing.assert_close(panel[0, 1:], own[:7], **NEARLY)
        torch.testing.assert_close(panel[1:, 0], own[7:], **NEARLY)
        torch.testing.assert_close(panel[1:, 1:], module.mix(generator, z[:7], z[7:], crossing), **NEARLY)
    torch.testing.assert_close(truncation[:, 10], pipeline(pipeline.noise(8), torch.zeros(8)), **NEARLY)
    half = (generator.styles(pipeline.noise(8)) / 2).detach()
    torch.testing.assert_close(truncation[:, 5], generator.synthesis(half, noise_seed=0).detach(), **NEARLY)
    torch.testing.assert_close(truncation[:, 0], truncation[:1, 0].expand(8, -1, -1, -1), **NEARLY)
    expected = module.renoise(generator, pipeline.noise(6), 100)
    torch.testing.assert_close(noise[:, :8], expected[:, :8], **NEARLY)
    deviation = expected.numpy().std(1, ddof=1)
    torch.testing.assert_close(noise[:, 8], torch.from_numpy(deviation / deviation.max() * 2 - 1), rtol=1e-2, atol=1e-2)


def test_training_grows_averages_and_draws_styles(module, monkeypatch, tmp_path, few_digits):
    """A tiny training: level, rates, average, optimizers; --from RUN --styles repeats the pictures of its end."""
    rates, step = [], module.generator_step

    def watch(generator, discriminator, optimizer, *rest):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(generator, discriminator, optimizer, *rest)

    monkeypatch.setattr(module, "generator_step", watch)
    module.main(["--dataset", "digits", "--epochs", "4", "--max-batches", "2", "--batch-size", "4", "--width", "32",
                 "--latent-dim", "8", "--lr-decay", "1", "--device", "cpu", "--eval-interval", "0",
                 "--output-dir", str(tmp_path)])
    run = tmp_path / "06_stylegan_blocks-digits-0001"
    levels = [json.loads(line)["level"] for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [module.level_at((step + 1) / 8, 3) for step in range(8)]
    assert levels == pytest.approx([(a + b) / 2 for a, b in zip(steps[::2], steps[1::2])])
    fast, slow = zip(*rates)
    assert fast == pytest.approx([module.CONSTANTS["stylegan"]["lr_g"] * (1 - step / 8) for step in range(8)])
    assert slow == pytest.approx([0.01 * rate for rate in fast])

    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    for name, network in (("optimizer_g", module.Generator(**SMALL)), ("optimizer_d", module.Discriminator(32, 1, 32))):
        assert len(checkpoint[name]["state"]) == len(list(network.parameters())), "every part of both was trained"
    torch.manual_seed(0)
    start = module.Generator(**SMALL).constant
    way = (checkpoint["average"]["constant"] - start).norm() / (checkpoint["generator"]["constant"] - start).norm()
    assert 0.2 < way < 0.9, "the average follows"

    module.main(["--device", "cpu", "--from", str(run), "--styles"])
    for name in module.STYLES:
        first, again = (Image.open(run / "samples" / f"{file}.png") for file in (name, f"{name}-seed0"))
        assert first.tobytes() == again.tobytes() and len(np.unique(first)) > 20
