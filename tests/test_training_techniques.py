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


def layers(network):
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("name, minibatch, steps, count", [("Discriminator", False, 60, 5),
                                                           ("PointsDiscriminator", True, 300, 5)])
def test_every_layer_is_normalised(module, name, minibatch, steps, count):
    """After some forward passes each weight's largest singular value, by numpy's SVD, is 1."""
    torch.manual_seed(0)
    network = getattr(module, name)(minibatch=minibatch)
    for _ in range(steps):
        network(torch.randn(2, *((1, 28, 28) if name == "Discriminator" else (2,))))
    network.eval()
    assert len(layers(network)) == count
    for layer in layers(network):
        weight = layer.weight.detach().flatten(1).numpy()
        assert np.linalg.norm(weight, 2) == pytest.approx(1, abs=0.02)


def test_table_tells_the_three_norms_apart(module):
    torch.manual_seed(0)
    network = module.PointsDiscriminator()
    network(torch.randn(2, 2))
    state = snapshot(network.state_dict().items())
    table = module.spectral_table(network)
    assert unchanged(state, network.state_dict()), "looking must not move the power iteration on"
    assert all(part.training for part in network.modules())
    network.eval()
    assert list(table) == [name for name, layer in network.named_modules() if layer in layers(network)]
    for row, layer in zip(table.values(), layers(network), strict=True):
        used = layer.weight.detach().double().numpy()
        trained = layer.parametrizations.weight.original.detach().double().numpy()
        parts = layer.parametrizations.weight[0]
        assert row["sigma"] == pytest.approx(np.linalg.norm(used, 2), rel=1e-4)
        assert row["frobenius"] == pytest.approx(np.linalg.norm(used), rel=1e-4)
        assert row["estimate"] == pytest.approx((parts._u.numpy() @ trained @ parts._v.numpy()).item(), rel=1e-4)
    assert table["2"]["frobenius"] > 3 * table["2"]["sigma"], "what 実装例6 prints is not the spectral norm"
    plain = module.PointsDiscriminator(normalise=nn.Identity())
    row = module.spectral_table(plain)["0"]
    assert row["estimate"] is None and row["sigma"] == pytest.approx(np.linalg.norm(plain[0].weight.detach(), 2))


def test_largest_sigma_is_in_the_epoch_line_and_the_table_at_the_end(log, capsys):
    rows, printed = log(), capsys.readouterr().out
    for row in rows:
        assert f"sigma {row['sigma']:9.4f}" in printed
    lines = [line.split() for line in printed.splitlines()]
    table = lines[lines.index(["layer", "sigma", "estimate", "frobenius"]) + 1:]
    assert [name for name, *_ in table] == ["0", "2", "4", "6"]
    assert max(float(sigma) for _, sigma, *_ in table) == pytest.approx(rows[-1]["sigma"], abs=1e-4)


@pytest.mark.parametrize("smoothing, a, b", [("none", 1, 0), ("two-sided", 0.9, 0.1), ("one-sided", 0.9, 0)])
def test_smoothed_labels(module, smoothing, a, b):
    """Cross-entropy against the labels of 3.4's table, by scipy; its gradient is 0 at D = a on reals, b on fakes."""
    real, fake = np.array([-30.0, -1.0, 3.0, 20.0]), np.array([-4.0, 0.0, 1.0, 30.0])
    entropy = lambda logits, label: -(label * log_expit(logits) + (1 - label) * log_expit(-logits)).mean()
    columns = [torch.tensor(logits).view(-1, 1).requires_grad_() for logits in (real, fake)]
    loss = module.discriminator_loss(*columns, smoothing)
    assert loss.item() == pytest.approx((entropy(real, a) + entropy(fake, b)) / 2, rel=1e-12)
    d_real, d_fake = torch.autograd.grad(loss, columns)
    torch.testing.assert_close(d_real, (columns[0].sigmoid() - a) / 8)
    torch.testing.assert_close(d_fake, (columns[1].sigmoid() - b) / 8)


def test_random_labels(module):
    """Real labels U(0.8, 1.2), new for each sample and each step; the loss may fall below zero."""
    torch.manual_seed(0)
    real, fake = torch.full((20_000, 1), 5.0, requires_grad=True), torch.full((20_000, 1), -50.0)
    gradient, again = (torch.autograd.grad(module.discriminator_loss(real, fake, "random"), real)[0] for _ in range(2))
    labels = 1 / (1 + math.exp(-5)) - gradient * 2 * len(real)
    assert 0.8 <= labels.min() < 0.801 and 1.199 < labels.max() <= 1.2001
    assert labels.mean() == pytest.approx(1, abs=0.003) and labels.std() == pytest.approx(0.4 / 12**0.5, abs=0.002)
    assert not torch.equal(gradient, again)
    losses = [module.discriminator_loss(torch.full((4, 1), 50.0), fake, "random").item() for _ in range(20)]
    assert min(losses) < 0 < max(losses)


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


def test_all_off_is_01_on_the_gaussians(log):
    """The baseline: the same networks, constants and random numbers give the same training, number for number."""
    ours, theirs = log(*OFF), log(script=load_script("01_vanilla_gan"))
    for name in ("epoch", "step", "D(x)", "D(G(z))", "loss_D", "loss_G"):
        assert [row[name] for row in ours] == [row[name] for row in theirs]


def test_every_remedy_makes_another_training(log):
    """Alone, and when all the others are on."""
    remedies = {"--spectral-norm": ("off", "on"), "--label-smoothing": ("none", "one-sided", "two-sided", "random"),
                "--minibatch-discrimination": ("off", "on"), "--ttur": ("off", "on"), "--n-critic": ("1", "2")}
    for index in (0, 1):  # beside which the others are off, or on
        usual = {name: values[index] for name, values in remedies.items()}
        cases = [usual, *({**usual, name: value} for name, values in remedies.items()
                          for value in values if value != usual[name])]
        logs = [log(*(word for pair in case.items() for word in pair)) for case in cases]
        assert all(one != other for i, one in enumerate(logs) for other in logs[:i])


def test_ttur_sets_both_rates(log, tmp_path, capsys):
    """And is refused beside one of them."""
    log("--ttur", "on")
    checkpoint = torch.load(next(tmp_path.glob("*/checkpoint.pt")), weights_only=True)
    assert [checkpoint[name]["param_groups"][0]["lr"] for name in ("optimizer_g", "optimizer_d")] == [1e-4, 4e-4]
    for flag in ("--lr-g", "--lr-d"):
        with pytest.raises(SystemExit) as stop:
            log("--ttur", "on", flag, "2e-4")
        assert stop.value.code == 2 and "--ttur" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1
