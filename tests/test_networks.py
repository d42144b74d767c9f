"""Every network of 01 to 05 (06 has tests of its own): the parameter counts of the text (as corrected), shapes, ranges."""

from argparse import Namespace

import pytest
import torch
from torch import nn

import common
from conftest import SCRIPTS, load_script, snapshot, unchanged

IMAGE, POINT = (1, 28, 28), (2,)
GENERATORS = [  # script, class, trainable parameters, shape of a sample
    ("01_vanilla_gan", "Generator", 581_264, IMAGE),
    ("01_vanilla_gan", "Chapter11Generator", 294_160, IMAGE),
    ("01_vanilla_gan", "KerasGenerator", 1_489_936, IMAGE),
    ("01_vanilla_gan", "PointsGenerator", 46_210, POINT),
    ("02_dcgan", "Generator", 856_065, IMAGE),
    ("03_wgan_gp", "Generator", 147_856, IMAGE),
    ("03_wgan_gp", "ConvGenerator", 856_065, IMAGE),
    ("03_wgan_gp", "PointsGenerator", 46_210, POINT),
    ("04_cgan", "Generator", 156_688, IMAGE),
    ("05_sn_label_smoothing", "Generator", 856_065, IMAGE),
    ("05_sn_label_smoothing", "PointsGenerator", 46_210, POINT),
    ("02_dcgan", "Generator64", 12_671_617, (1, 64, 64)),
]
CRITICS = [  # script, class, trainable parameters, shape of a sample, outputs
    ("01_vanilla_gan", "Discriminator", 533_505, IMAGE, 1),
    ("01_vanilla_gan", "Chapter11Discriminator", 133_762, IMAGE, 2),
    ("01_vanilla_gan", "PointsDiscriminator", 33_537, POINT, 1),
    ("02_dcgan", "Discriminator", 98_113, IMAGE, 1),
    ("03_wgan_gp", "Critic", 133_633, IMAGE, 1),
    ("03_wgan_gp", "ConvCritic", 97_665, IMAGE, 1),
    ("03_wgan_gp", "PointsCritic", 33_537, POINT, 1),
    ("04_cgan", "Critic", 142_465, IMAGE, 1),
    ("05_sn_label_smoothing", "Discriminator", 2_755_009, IMAGE, 1),
    ("05_sn_label_smoothing", "PointsDiscriminator", 33_537, POINT, 1),
    ("02_dcgan", "Discriminator64", 11_033_985, (1, 64, 64), 1),
]


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def labels(script, size):
    return (torch.arange(size) % 10,) if script == "04_cgan" else ()


@pytest.mark.parametrize("script, name, parameters, shape", GENERATORS)
def test_generator(script, name, parameters, shape):
    network = getattr(load_script(script), name)()
    assert count(network) == parameters
    samples = network(50 * torch.randn(7, 100), *labels(script, 7))
    assert samples.shape == (7, *shape)
    if shape != POINT:
        assert samples.abs().max() <= 1
    else:
        assert samples.abs().max() > 1, "points beyond 1 must be reachable"


@pytest.mark.parametrize("script, name, parameters, shape, outputs", CRITICS)
def test_discriminator(script, name, parameters, shape, outputs):
    network = getattr(load_script(script), name)()
    assert count(network) == parameters
    nn.init.constant_([layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1].bias, 5.0)
    scores = network(torch.randn(7, *shape), *labels(script, 7))
    assert scores.shape == (7, outputs)
    assert scores.max() > 2, "logits and scores are unbounded"


@pytest.mark.parametrize("script, name, slope", [
    ("01_vanilla_gan", "Generator", 0.2), ("01_vanilla_gan", "Discriminator", 0.2),
    ("01_vanilla_gan", "Chapter11Generator", 0.3), ("01_vanilla_gan", "Chapter11Discriminator", 0.3),
    ("01_vanilla_gan", "KerasGenerator", 0.2), ("02_dcgan", "Discriminator", 0.2),
    ("03_wgan_gp", "Generator", 0.3), ("03_wgan_gp", "Critic", 0.3), ("03_wgan_gp", "ConvCritic", 0.2),
    ("04_cgan", "Generator", 0.3), ("04_cgan", "Critic", 0.3), ("05_sn_label_smoothing", "Discriminator", 0.2)])
def test_slope_of_the_text(script, name, slope):
    layers = [layer for layer in getattr(load_script(script), name)().modules() if isinstance(layer, nn.LeakyReLU)]
    assert layers and {layer.negative_slope for layer in layers} == {slope}


@pytest.mark.parametrize("script, name, kind, rate, times", [
    ("01_vanilla_gan", "Chapter11Discriminator", common.Dropout, 0.5, 3), ("03_wgan_gp", "Critic", common.Dropout, 0.5, 3),
    ("04_cgan", "Critic", common.Dropout, 0.5, 3), ("02_dcgan", "Discriminator", nn.Dropout2d, 0.25, 4),
    ("03_wgan_gp", "ConvCritic", nn.Dropout2d, 0.25, 4)])
def test_dropout_of_the_text(script, name, kind, rate, times):
    layers = [getattr(layer, "p", 0.5) for layer in getattr(load_script(script), name)().modules() if isinstance(layer, kind)]
    assert layers == [rate] * times


L, B, R, LEAKY, DROP, CONV = "Linear", "BatchNorm1d", "ReLU", "LeakyReLU", "Dropout", "Conv2d"
IMAGE_END, CONVOLUTIONS = [L, "Tanh", "Unflatten"], [CONV, LEAKY, "Dropout2d"]
MLP_CRITIC = [*[L, LEAKY, DROP] * 3, L]
DCGAN = [L, "Unflatten", "BatchNorm2d", *["Upsample", CONV, "BatchNorm2d", R] * 2, CONV, "Tanh"]
ORDER = [
    ("01_vanilla_gan", "Generator", [L, LEAKY, *[L, B, LEAKY] * 2, *IMAGE_END]),
    ("01_vanilla_gan", "Discriminator", ["Flatten", *[L, LEAKY] * 2, L]),
    ("01_vanilla_gan", "Chapter11Generator", [*[L, LEAKY, B] * 2, *IMAGE_END]),
    ("01_vanilla_gan", "Chapter11Discriminator", ["Flatten", *MLP_CRITIC]),
    ("01_vanilla_gan", "KerasGenerator", [*[L, LEAKY, B] * 3, *IMAGE_END]),
    ("02_dcgan", "Generator", DCGAN),
    ("02_dcgan", "Discriminator", [*CONVOLUTIONS, *[*CONVOLUTIONS, "BatchNorm2d"] * 3, "Flatten", L]),
    ("03_wgan_gp", "Generator", [*[L, LEAKY, B] * 3, *IMAGE_END]),
    ("03_wgan_gp", "Critic", MLP_CRITIC),
    ("03_wgan_gp", "ConvGenerator", DCGAN),
    ("03_wgan_gp", "ConvCritic", [*CONVOLUTIONS * 4, "Flatten", L]),
    ("04_cgan", "Generator", ["Embedding", *[L, LEAKY, B] * 3, *IMAGE_END]),
    ("04_cgan", "Critic", ["Embedding", *MLP_CRITIC]),
    ("05_sn_label_smoothing", "Generator", DCGAN),
    ("02_dcgan", "Generator64", [L, "Unflatten", "BatchNorm2d", R, *["ConvTranspose2d", "BatchNorm2d", R] * 3, "ConvTranspose2d", "Tanh"]),
    ("02_dcgan", "Discriminator64", [CONV, LEAKY, *[CONV, "BatchNorm2d", LEAKY] * 3, "Flatten", L]),
]


@pytest.mark.parametrize("script, name, expected", ORDER)
def test_layers_stand_in_the_order_of_the_text(script, name, expected):
    layers = [layer for layer in getattr(load_script(script), name)().modules() if not list(layer.children())]
    assert [type(layer).__name__ for layer in layers] == expected
    assert {layer.mode for layer in layers if isinstance(layer, nn.Upsample)} <= {"nearest"}
    kernel = (4, 4) if name.endswith("64") else (3, 3)
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
    assert {(layer.kernel_size, layer.padding) for layer in convolutions} <= {(kernel, (1, 1))}


def test_keras_batch_norm_is_translated():
    """Keras' momentum 0.8 keeps 0.8 of the old mean; torch's momentum is what the new one gets."""
    network = load_script("01_vanilla_gan").KerasGenerator()
    norms = [layer for layer in network if isinstance(layer, nn.BatchNorm1d)]
    assert [(layer.momentum, layer.eps) for layer in norms] == [(0.2, 1e-3)] * 3


@pytest.mark.parametrize("script, name, parameters, shape, outputs", CRITICS)
def test_critics_judge_each_sample_alone(script, name, parameters, shape, outputs):
    """d C(x_0) / d x_1 = 0, without which a penalty per sample means nothing. 02's BatchNorm does mix."""
    torch.manual_seed(0)
    x = torch.randn(4, *shape, requires_grad=True)
    network = getattr(load_script(script), name)()
    gradient, = torch.autograd.grad(network(x, *labels(script, 4))[0].sum(), x)
    assert gradient[0].abs().max() > 0
    assert (gradient[1:].abs().max() == 0) == (script != "02_dcgan")


@pytest.mark.parametrize("name", ["Generator", "Critic"])
def test_cgan_uses_its_label(name):
    module = load_script("04_cgan")
    network = getattr(module, name)().eval()
    x = torch.randn(1, *((100,) if name == "Generator" else IMAGE)).expand(10, *[-1] * (1 if name == "Generator" else 3))
    outputs = network(x, torch.arange(10)).flatten(1)
    assert len(outputs.unique(dim=0)) == 10


@pytest.mark.parametrize("script", SCRIPTS)
def test_noise(script):
    module = load_script(script)
    for variant, row in module.CONSTANTS.items():
        args = Namespace(**row)
        z = module.generate_noise(20_000, args, "cpu", torch.Generator().manual_seed(0))
        assert z.shape == (20_000, row["latent_dim"])
        uniform = (script, variant) in {("01_vanilla_gan", "two-logit"), ("03_wgan_gp", "mlp"), ("04_cgan", "cgan")}
        assert (z.abs().max() <= 1) == uniform
        assert abs(z.mean()) < 0.01 and abs(z.std() - (3**-0.5 if uniform else 1)) < 0.01


def seeded(make, *arguments, **settings):
    torch.manual_seed(0)
    return snapshot(make(*arguments, **settings).state_dict().items())


def test_points_networks_are_the_same_in_01_03_and_05():
    """Collapse and cure are only comparable on equal networks."""
    first, third, fifth = (load_script(name) for name in ("01_vanilla_gan", "03_wgan_gp", "05_sn_label_smoothing"))
    for other in (third, fifth):
        assert unchanged(seeded(first.PointsGenerator), seeded(other.PointsGenerator))
    discriminator = first.PointsDiscriminator
    assert unchanged(seeded(discriminator), seeded(third.PointsCritic))
    assert unchanged(seeded(discriminator), seeded(fifth.PointsDiscriminator, normalise=nn.Identity()))
    for ours, theirs in [(discriminator(), third.PointsCritic()), (discriminator(), fifth.PointsDiscriminator(normalise=nn.Identity()))]:
        assert str(ours).split("\n")[1:] == str(theirs).split("\n")[1:]


def test_03_and_05_train_the_generator_of_02():
    """3.4 trains the generator of 3.3."""
    expected = seeded(load_script("02_dcgan").Generator)
    assert unchanged(expected, seeded(load_script("03_wgan_gp").ConvGenerator))
    assert unchanged(expected, seeded(load_script("05_sn_label_smoothing").Generator))


@pytest.mark.parametrize("generator, discriminator, size", [("Generator", "Discriminator", 28),
                                                            ("Generator64", "Discriminator64", 64)])
def test_dcgan_in_colour(generator, discriminator, size):
    module = load_script("02_dcgan")
    samples = getattr(module, generator)(9, channels=3)(torch.randn(2, 9))
    assert samples.shape == (2, 3, size, size)
    assert getattr(module, discriminator)(channels=3)(samples).shape == (2, 1)


def test_ladder_starts_as_the_paper_says():
    """arXiv 1511.06434, section 4: weights N(0, 0.02^2); torch's own start of these layers is much wider or narrower."""
    module = load_script("02_dcgan")
    for network in (module.Generator64(), module.Discriminator64()):
        for layer in network:
            if hasattr(layer, "weight"):
                norm = isinstance(layer, nn.BatchNorm2d)
                assert layer.weight.detach().mean() == pytest.approx(1 if norm else 0, abs=0.005)
                assert layer.weight.detach().std() == pytest.approx(0.02, rel=0.2)
                assert not layer.bias.any()


def test_ladder_follows_the_figure():
    """3.3: 4x4x1024, 8x8x512, 16x16x256, 32x32x128, 64x64; the discriminator walks it back."""
    module = load_script("02_dcgan")
    shapes = []
    for network, x in ((module.Generator64(), torch.randn(2, 100)), (module.Discriminator64(), torch.randn(2, 1, 64, 64))):
        for layer in network:
            x = layer(x)
            if isinstance(layer, nn.Unflatten | nn.Conv2d | nn.ConvTranspose2d):
                shapes.append(tuple(x.shape[1:]))
    ladder = [(1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32)]
    assert shapes == [*ladder, (1, 64, 64), *reversed(ladder)]
