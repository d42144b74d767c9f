"""Every network of 01 to 05 (06 has tests of its own): counts and layers of the text (as corrected), shapes, ranges."""

from argparse import Namespace

import pytest
import torch
from torch import nn

import common
from conftest import SCRIPTS, load_script, snapshot, unchanged

IMAGE, POINT = (1, 28, 28), (2,)
L, B, R, LEAKY, DROP, CONV, UP = "Linear", "BatchNorm1d", "ReLU", "LeakyReLU", "Dropout", "Conv2d", "ConvTranspose2d"
TO_IMAGE, CONVOLUTIONS = [L, "Tanh", "Unflatten"], [CONV, LEAKY, "Dropout2d"]
MLP_CRITIC = [*[L, LEAKY, DROP] * 3, L]
DCGAN = [L, "Unflatten", "BatchNorm2d", *["Upsample", CONV, "BatchNorm2d", R] * 2, CONV, "Tanh"]
POINTS = [*[L, LEAKY] * 3, L]
GENERATORS = [  # script, class, trainable parameters, shape of a sample, layers in the text's order, slope of LeakyReLU
    ("01_vanilla_gan", "Generator", 581_264, IMAGE, [L, LEAKY, *[L, B, LEAKY] * 2, *TO_IMAGE], 0.2),
    ("01_vanilla_gan", "Chapter11Generator", 294_160, IMAGE, [*[L, LEAKY, B] * 2, *TO_IMAGE], 0.3),
    ("01_vanilla_gan", "KerasGenerator", 1_489_936, IMAGE, [*[L, LEAKY, B] * 3, *TO_IMAGE], 0.2),
    ("02_dcgan", "Generator", 856_065, IMAGE, DCGAN, None),
    ("02_dcgan", "Generator64", 12_671_617, (1, 64, 64),
     [L, "Unflatten", "BatchNorm2d", R, *[UP, "BatchNorm2d", R] * 3, UP, "Tanh"], None),
    ("03_wgan_gp", "Generator", 147_856, IMAGE, [*[L, LEAKY, B] * 3, *TO_IMAGE], 0.3),
    ("03_wgan_gp", "ConvGenerator", 856_065, IMAGE, DCGAN, None),
    ("04_cgan", "Generator", 156_688, IMAGE, ["Embedding", *[L, LEAKY, B] * 3, *TO_IMAGE], 0.3),
    ("05_sn_label_smoothing", "Generator", 856_065, IMAGE, DCGAN, None),
    ("common", "points_generator", 46_210, POINT, POINTS, 0.2),
]
CRITICS = [  # the same; and the numbers per sample that it returns
    ("01_vanilla_gan", "Discriminator", 533_505, IMAGE, ["Flatten", *[L, LEAKY] * 2, L], 0.2, 1),
    ("01_vanilla_gan", "Chapter11Discriminator", 133_762, IMAGE, ["Flatten", *MLP_CRITIC], 0.3, 2),
    ("02_dcgan", "Discriminator", 98_113, IMAGE,
     [*CONVOLUTIONS, *[*CONVOLUTIONS, "BatchNorm2d"] * 3, "Flatten", L], 0.2, 1),
    ("02_dcgan", "Discriminator64", 11_033_985, (1, 64, 64),
     [CONV, LEAKY, *[CONV, "BatchNorm2d", LEAKY] * 3, "Flatten", L], 0.2, 1),
    ("03_wgan_gp", "Critic", 133_633, IMAGE, MLP_CRITIC, 0.3, 1),
    ("03_wgan_gp", "ConvCritic", 97_665, IMAGE, [*CONVOLUTIONS * 4, "Flatten", L], 0.2, 1),
    ("04_cgan", "Critic", 142_465, IMAGE, ["Embedding", *MLP_CRITIC], 0.3, 1),
    ("05_sn_label_smoothing", "Discriminator", 2_755_009, IMAGE, None, 0.2, 1),
    ("common", "points_critic", 33_537, POINT, POINTS, 0.2, 1),
]


def make(script, name, **settings):
    """A network, always with the same weights."""
    torch.manual_seed(0)
    return getattr(common if script == "common" else load_script(script), name)(**settings)


def labels(script, size):
    return (torch.arange(size) % 10,) if script == "04_cgan" else ()


def check_layers(network, parameters, layers, slope):
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    parts = [part for part in network.modules() if not list(part.children())]
    assert layers is None or [type(part).__name__ for part in parts] == layers
    assert {part.negative_slope for part in parts if isinstance(part, nn.LeakyReLU)} == ({slope} - {None})
    assert {part.p for part in parts if isinstance(part, nn.Dropout2d)} <= {0.25}
    assert {part.p for part in parts if isinstance(part, nn.Dropout)} <= {0.5}
    assert {part.mode for part in parts if isinstance(part, nn.Upsample)} <= {"nearest"}


@pytest.mark.parametrize("script, name, parameters, shape, layers, slope", GENERATORS)
def test_generator(script, name, parameters, shape, layers, slope):
    network = make(script, name)
    check_layers(network, parameters, layers, slope)
    samples = network(50 * torch.randn(7, 100), *labels(script, 7))
    assert samples.shape == (7, *shape)
    assert (samples.abs().max() <= 1) == (shape != POINT), "points beyond 1 must be reachable"


@pytest.mark.parametrize("script, name, parameters, shape, layers, slope, outputs", CRITICS)
def test_critic(script, name, parameters, shape, layers, slope, outputs):
    """Its scores are unbounded; d C(x_0) / d x_1 = 0, without which a penalty per sample means nothing."""
    network = make(script, name)
    check_layers(network, parameters, layers, slope)
    nn.init.constant_([layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1].bias, 5.0)
    x = torch.randn(4, *shape, requires_grad=True)
    scores = network(x, *labels(script, 4))
    assert scores.shape == (4, outputs) and scores.max() > 2
    gradient, = torch.autograd.grad(scores[0].sum(), x)
    assert gradient[0].abs().max() > 0
    assert (gradient[1:].abs().max() == 0) == (script != "02_dcgan"), "02's BatchNorm does mix"


def test_keras_batch_norm_is_translated():
    """Keras' momentum 0.8 keeps 0.8 of the old mean; torch's momentum is what the new one gets."""
    norms = [layer for layer in make("01_vanilla_gan", "KerasGenerator") if isinstance(layer, nn.BatchNorm1d)]
    assert [(layer.momentum, layer.eps) for layer in norms] == [(0.2, 1e-3)] * 3


@pytest.mark.parametrize("name, shape", [("Generator", (100,)), ("Critic", IMAGE)])
def test_cgan_uses_its_label(name, shape):
    network, x = make("04_cgan", name).eval(), torch.randn(1, *shape)
    outputs = network(torch.cat([x] * 10), torch.arange(10)).flatten(1)
    assert len(outputs.unique(dim=0)) == 10


@pytest.mark.parametrize("script", SCRIPTS)
def test_noise(script):
    module = load_script(script)
    for variant, row in module.CONSTANTS.items():
        z = module.generate_noise(20_000, Namespace(**row), "cpu", torch.Generator().manual_seed(0))
        assert z.shape == (20_000, row["latent_dim"])
        uniform = (script, variant) in {("01_vanilla_gan", "two-logit"), ("03_wgan_gp", "mlp"), ("04_cgan", "cgan")}
        assert (z.abs().max() <= 1) == uniform
        assert abs(z.mean()) < 0.01 and abs(z.std() - (3**-0.5 if uniform else 1)) < 0.01


def test_networks_that_are_the_same_in_several_scripts():
    """Collapse and cure only compare on equal networks; 3.4 trains the generator of 3.3."""
    state = lambda *which, **settings: snapshot(make(*which, **settings).state_dict().items())
    dcgan, five = state("02_dcgan", "Generator"), "05_sn_label_smoothing"
    assert unchanged(dcgan, state("03_wgan_gp", "ConvGenerator")) and unchanged(dcgan, state(five, "Generator"))
    plain = make(five, "PointsDiscriminator", normalise=nn.Identity())
    assert unchanged(state("common", "points_critic"), plain.state_dict())
    for script in ("01_vanilla_gan", "03_wgan_gp"):
        assert load_script(script).NETWORKS["points"] == (common.points_generator, common.points_critic)
    assert load_script(five).NETWORKS["points"][0] == common.points_generator


def test_ladder_of_the_figure():
    """3.3, in colour: 4x4 to 64x64 and back. Weights from N(0, 0.02^2), BatchNorm's N(1, 0.02^2) (arXiv 1511.06434)."""
    shapes, x = [], torch.randn(2, 100)
    layers = [layer for name in ("Generator64", "Discriminator64") for layer in make("02_dcgan", name, channels=3)]
    for layer in layers:
        x = layer(x)
        if isinstance(layer, nn.Unflatten | nn.Conv2d | nn.ConvTranspose2d):
            shapes.append(tuple(x.shape[1:]))
        if hasattr(layer, "weight"):
            mean = 1 if isinstance(layer, nn.BatchNorm2d) else 0
            assert layer.weight.detach().mean() == pytest.approx(mean, abs=0.005)
            assert layer.weight.detach().std() == pytest.approx(0.02, rel=0.2)
            assert not layer.bias.any()
    ladder = [(1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32)]
    assert shapes == [*ladder, (3, 64, 64), *reversed(ladder)]
