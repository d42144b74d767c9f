"""What each remedy of 05 does: spectral normalisation, smoothed labels, minibatch discrimination, learning rates."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.special import log_expit
from torch import nn

import common
from conftest import load_script, snapshot, unchanged

QUICK = ["--dataset", "gaussians", "--epochs", "2", "--max-batches", "5", "--batch-size", "32", "--device", "cpu"]
OFF = ["--spectral-norm", "off"]


@pytest.fixture
def module():
    return load_script("05_sn_label_smoothing")


def layers(network):
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


@pytest.fixture
def log(module, tmp_path, monkeypatch):
    """Train on the Gaussians without drawing; the log without `seconds`."""
    for name in ("save_picture", "save_curves", "save_film"):
        monkeypatch.setattr(common, name, lambda *arguments, **settings: None)

    def call(*flags, script=module):
        script.main([*QUICK, *flags, "--output-dir", str(tmp_path)])
        rows = [json.loads(line) for line in (max(tmp_path.iterdir()) / "log.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    return call


@pytest.mark.parametrize("name", ["Discriminator", "PointsDiscriminator"])
@pytest.mark.parametrize("minibatch", [False, True])
def test_every_layer_is_normalised(module, name, minibatch):
    """After some forward passes each weight's largest singular value, by numpy's SVD, is 1."""
    torch.manual_seed(0)
    network = getattr(module, name)(minibatch=minibatch)
    for _ in range(300 if name == "PointsDiscriminator" else 60):
        network(torch.randn(2, *((1, 28, 28) if name == "Discriminator" else (2,))))
    network.eval()
    assert len(layers(network)) == (5 if name == "Discriminator" else 4) + minibatch
    for layer in layers(network):
        weight = layer.weight.detach().flatten(1).numpy()
        assert np.linalg.svd(weight, compute_uv=False)[0] == pytest.approx(1, abs=0.02)


def test_table_tells_the_three_norms_apart(module):
    torch.manual_seed(0)
    network = module.Discriminator()
    network(torch.randn(2, 1, 28, 28))
    state = snapshot(network.state_dict().items())
    table = module.spectral_table(network)
    assert unchanged(state, network.state_dict()), "looking must not move the power iteration on"
    assert all(part.training for part in network.modules())
    network.eval()
    assert list(table) == [name for name, layer in network.named_modules() if layer in layers(network)]
    for row, layer in zip(table.values(), layers(network), strict=True):
        used = layer.weight.detach().flatten(1).double().numpy()
        trained = layer.parametrizations.weight.original.detach().flatten(1).double().numpy()
        parts = layer.parametrizations.weight[0]
        assert row["sigma"] == pytest.approx(np.linalg.norm(used, 2), rel=1e-4)
        assert row["frobenius"] == pytest.approx(np.linalg.norm(used), rel=1e-4)
        assert row["estimate"] == pytest.approx((parts._u.numpy() @ trained @ parts._v.numpy()).item(), rel=1e-4)
    assert table["2"]["frobenius"] > 5 * table["2"]["sigma"], "what example 6 prints is not the spectral norm"
    plain = module.Discriminator(normalise=nn.Identity())
    for row, layer in zip(module.spectral_table(plain).values(), layers(plain), strict=True):
        assert row["estimate"] is None and row["sigma"] == pytest.approx(np.linalg.norm(layer.weight.detach().flatten(1), 2), rel=1e-4)


def test_largest_sigma_is_in_the_epoch_line_and_the_table_at_the_end(log, capsys):
    rows, printed = log(), capsys.readouterr().out
    for row in rows:
        assert row["sigma"] == pytest.approx(max(layer["sigma"] for layer in row["layers"].values()))
        assert f"sigma {row['sigma']:9.4f}" in printed
    lines = printed.splitlines()
    start = next(index for index, line in enumerate(lines) if line.split() == ["layer", "sigma", "estimate", "frobenius"])
    for line, (name, values) in zip(lines[start + 1:], rows[-1]["layers"].items(), strict=False):
        assert line.split() == [name, *(f"{value:.4f}" for value in values.values())]


@pytest.mark.parametrize("smoothing, a, b", [("none", 1, 0), ("two-sided", 0.9, 0.1), ("one-sided", 0.9, 0)])
def test_smoothed_labels(module, smoothing, a, b):
    """Cross-entropy against the labels of 3.4's table, by scipy; its minimum lies where D = a on reals and D = b on fakes."""
    real, fake = np.array([-30.0, -1.0, 3.0, 20.0]), np.array([-4.0, 0.0, 1.0, 30.0])
    entropy = lambda logits, label: -(label * log_expit(logits) + (1 - label) * log_expit(-logits)).mean()
    columns = [torch.tensor(logits).view(-1, 1).requires_grad_() for logits in (real, fake)]
    loss = module.discriminator_loss(*columns, smoothing)
    assert loss.item() == pytest.approx((entropy(real, a) + entropy(fake, b)) / 2, rel=1e-12)
    d_real, d_fake = torch.autograd.grad(loss, columns)
    torch.testing.assert_close(d_real, (columns[0].sigmoid() - a) / 8)
    torch.testing.assert_close(d_fake, (columns[1].sigmoid() - b) / 8)


def test_random_labels(module):
    """Real labels U(0.8, 1.2), new for each sample and each step; the loss falls below zero."""
    torch.manual_seed(0)
    real = torch.full((20_000, 1), 5.0, requires_grad=True)
    fake = torch.full((20_000, 1), -50.0)
    loss = module.discriminator_loss(real, fake, "random")
    gradient, = torch.autograd.grad(loss, real)
    labels = 1 / (1 + math.exp(-5)) - gradient * 2 * len(real)
    assert 0.8 <= labels.min() < 0.801 and 1.199 < labels.max() <= 1.2001
    assert labels.mean() == pytest.approx(1, abs=0.003) and labels.std() == pytest.approx(0.4 / 12**0.5, abs=0.002)
    other, = torch.autograd.grad(module.discriminator_loss(real, fake, "random"), real)
    assert not torch.equal(gradient, other)
    few = module.discriminator_loss(torch.full((4, 1), 50.0), torch.full((4, 1), -50.0), "random")
    means = [module.discriminator_loss(torch.full((4, 1), 50.0), torch.full((4, 1), -50.0), "random").item() for _ in range(20)]
    assert few.isfinite() and min(means) < 0 < max(means)


def test_equilibrium_of_each_smoothing(module):
    """D* = (a + b) / 2: the guides of curves.png. One-sided: 0.45, where G's loss is 0.799 and not ln 2."""
    for smoothing, d in [("none", 0.5), ("two-sided", 0.5), ("one-sided", 0.45)]:
        logit = torch.tensor([[math.log(d / (1 - d))]], dtype=torch.float64)
        losses = [module.discriminator_loss(logit + shift, logit + shift, smoothing).item() for shift in (-0.01, 0.0, 0.01)]
        assert losses[1] < losses[0] and losses[1] < losses[2]
    assert module.generator_loss(logit).item() == pytest.approx(0.7985, abs=1e-4)


def test_minibatch_discrimination(module):
    """o_b(x_i) = mean_j exp(-||M_ib - M_jb||_1), written as loops; 1 for a collapsed batch."""
    torch.manual_seed(0)
    layer = module.MinibatchDiscrimination(6, lambda part: part).double()
    f = torch.randn(5, 6, dtype=torch.float64)
    m = layer.project(f).view(5, module.ROWS, module.ROW_DIM).tolist()
    close = lambda i, j, b: math.exp(-sum(abs(x - y) for x, y in zip(m[i][b], m[j][b], strict=True)))
    expected = torch.tensor([[sum(close(i, j, b) for j in range(5)) / 5 for b in range(module.ROWS)] for i in range(5)],
                            dtype=torch.float64)
    torch.testing.assert_close(layer(f)[:, 6:], expected)
    torch.testing.assert_close(layer(f)[:, :6], f)
    torch.testing.assert_close(layer(f[:1].expand(5, -1))[:, 6:], torch.ones(5, module.ROWS, dtype=torch.float64))
    assert torch.autograd.gradcheck(layer, (f[:3].requires_grad_(),))


@pytest.mark.parametrize("name, shape", [("Discriminator", (1, 28, 28)), ("PointsDiscriminator", (2,))])
def test_minibatch_discrimination_lets_samples_see_each_other(module, name, shape):
    x = torch.randn(4, *shape, requires_grad=True)
    torch.manual_seed(0)
    gradient, = torch.autograd.grad(getattr(module, name)(minibatch=True)(x)[0].sum(), x)
    assert (gradient[1:].flatten(1).abs().sum(1) > 0).all()


def test_all_off_is_01_on_the_gaussians(log):
    """The baseline: the same networks, constants and random numbers give the same training, number for number."""
    ours = log(*OFF)
    theirs = log(script=load_script("01_vanilla_gan"))
    shared = ["epoch", "step", "D(x)", "D(G(z))", "loss_D", "loss_G"]
    assert [{name: row[name] for name in shared} for row in ours] == [{name: row[name] for name in shared} for row in theirs]


@pytest.mark.parametrize("flags", [["--label-smoothing", "two-sided"], ["--label-smoothing", "one-sided"], ["--label-smoothing", "random"],
                                   ["--minibatch-discrimination", "on"], ["--ttur", "on"], ["--n-critic", "3"], ["--spectral-norm", "on"]])
def test_each_remedy_alone(log, flags):
    assert log(*OFF, *flags) != log(*OFF)


def test_all_remedies_combine(log):
    """Each of them still changes something when all the others are on."""
    everything = {"--spectral-norm": "on", "--label-smoothing": "one-sided", "--minibatch-discrimination": "on", "--ttur": "on", "--n-critic": "2"}
    flags = lambda chosen: [word for pair in chosen.items() for word in pair]
    together = log(*flags(everything))
    for name, plain in zip(everything, ["off", "none", "off", "off", "1"], strict=True):
        assert log(*flags({**everything, name: plain})) != together


def test_ttur_sets_both_rates(log, tmp_path):
    log("--ttur", "on")
    checkpoint = torch.load(max(tmp_path.iterdir()) / "checkpoint.pt", weights_only=True)
    assert [checkpoint[name]["param_groups"][0]["lr"] for name in ("optimizer_g", "optimizer_d")] == [1e-4, 4e-4]
    assert (checkpoint["options"]["lr_g"], checkpoint["options"]["lr_d"]) == (1e-4, 4e-4)


@pytest.mark.parametrize("flag", ["--lr-g", "--lr-d"])
def test_ttur_is_refused_beside_a_rate(log, capsys, tmp_path, flag):
    with pytest.raises(SystemExit) as stop:
        log("--ttur", "on", flag, "2e-4")
    assert stop.value.code == 2 and "--ttur on sets both learning rates" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    log("--ttur", "off", flag, "2e-4")


def test_n_critic_steps_have_their_own_batches(module, log, monkeypatch):
    seen, step = [], module.discriminator_step
    monkeypatch.setattr(module, "discriminator_step", lambda *arguments: (seen.append(arguments[3:5]), step(*arguments))[1])
    log("--n-critic", "3")
    assert len(seen) == 2 * 5 * 3
    for values in zip(*seen):
        assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
