"""The gradient penalty of 03 and 04: the formula against closed forms, the fused operation against the formula; Dropout."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from conftest import load_script  # puts common on the path

import common
from csrc import build, ops

BOTH = pytest.mark.parametrize("script", ["03_wgan_gp", "04_cgan"])


def penalty_of(script, critic, real, fake):
    """The penalty function of a script, with some labels where it takes them."""
    labels = [torch.arange(len(real)) % 10] if script == "04_cgan" else []
    return load_script(script).gradient_penalty(critic, real, fake, *labels)


@BOTH
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 5, 7), (2,)])
def test_linear_critic(script, shape):
    """C(x) = a . x has the gradient a everywhere: norm ||a||, penalty (||a|| - 1)^2."""
    a = torch.linspace(-1, 2, torch.Size(shape).numel())
    penalty, norm = penalty_of(script, lambda x, *labels: x.flatten(1) @ a, *torch.randn(2, 6, *shape))
    torch.testing.assert_close(norm, a.norm())
    torch.testing.assert_close(penalty, (a.norm() - 1).square())


@BOTH
def test_quadratic_critic_and_the_weights_gradient(script):
    """C(x) = s/2 ||x||^2 at real = fake = x: norms s ||x||, d penalty / ds = mean 2 (s ||x|| - 1) ||x||."""
    x, s = torch.randn(5, 1, 2, 3), torch.tensor(0.7, requires_grad=True)
    length = x.flatten(1).norm(dim=1)
    penalty, norm = penalty_of(script, lambda x, *labels: s / 2 * x.flatten(1).square().sum(1, keepdim=True), x, x)
    penalty.backward()
    torch.testing.assert_close(norm, (0.7 * length).mean())
    torch.testing.assert_close(penalty, (0.7 * length - 1).square().mean())
    torch.testing.assert_close(s.grad, (2 * (0.7 * length - 1) * length).mean())


@BOTH
def test_constant_critic_stays_finite(script):
    """All weights zero: norm 0, penalty 1, and no NaN in any gradient."""
    critic = load_script(script).Critic()
    for parameter in critic.parameters():
        torch.nn.init.zeros_(parameter)
    penalty, norm = penalty_of(script, critic, *torch.randn(2, 3, 1, 28, 28))
    penalty.backward()
    assert (penalty.item(), norm.item()) == (1, 0)
    gradients = [parameter.grad for parameter in critic.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@BOTH
def test_x_hat_lies_between_real_and_fake(script):
    """x_hat = epsilon x + (1 - epsilon) G(z): one epsilon per sample, uniform on (0, 1)."""
    seen = []

    def critic(x, *labels):
        seen.append(x.detach())
        return x.flatten(1).sum(1)

    torch.manual_seed(0)
    penalty_of(script, critic, torch.ones(4000, 1, 2, 2), torch.full((4000, 1, 2, 2), -1.0))
    epsilon = (seen[0].flatten(1) + 1) / 2
    assert torch.equal(epsilon, epsilon[:, :1].expand(-1, 4))
    ordered = epsilon[:, 0].sort().values
    assert 0 <= ordered[0] and ordered[-1] <= 1
    assert (ordered - torch.linspace(0, 1, 4000)).abs().max() < 0.03  # Kolmogorov's distance; 1 % would exceed 0.026


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_from_random_bytes(dtype):
    """Half of the numbers, at any size; neither neighbours nor samples nor calls have anything in common."""
    torch.manual_seed(0)
    layer = common.Dropout(0.5)
    x = torch.rand(1001, 129, dtype=dtype, requires_grad=True)
    y, again = layer(x), layer(x)
    kept = (y != 0).double()
    assert torch.equal(y, 2 * x * kept) and y.dtype == dtype
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 2 * kept.to(dtype))
    sigma = x.numel()**-0.5
    assert abs(kept.mean() - 0.5) < 4 * sigma / 2
    for other in [kept.roll(shift, dim) for shift in (1, 2, 7, 8, 64) for dim in (0, 1)] + [(again != 0).double()]:
        assert abs(((kept - 0.5) * (other - 0.5)).mean()) < 4 * sigma / 4
    assert (kept.mean(0) - 0.5).abs().max() < 5 * 1001**-0.5 / 2, "no column is favoured"
    assert torch.equal(layer.eval()(x), x)
    unusual = common.Dropout(0.25)(torch.ones(100_000))  # nn.Dropout's own masks
    torch.testing.assert_close(unusual.unique(), torch.tensor([0, 4 / 3]))
    assert (unusual == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)


# ------------------------------------------------------------------------- the fused operation
try:
    build.load("cpu")
    missing = None
except build.Unavailable as reason:
    missing = str(reason)
fused = pytest.mark.skipif(missing is not None, reason=f"no kernels: {missing}")


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setitem(ops.KERNELS, "cpu", torch.ops.gan_cpu)


def case(name, samples=40, dtype=torch.float64):
    """A gradient penalty and what it takes: of 03, of 04, of 03 for points."""
    torch.manual_seed(1)
    script = load_script("04_cgan" if name == "04" else "03_wgan_gp")
    critic = (common.points_critic() if name == "points" else script.Critic()).to(dtype)
    for parameter in critic.parameters():
        parameter.data *= 3  # norms on both sides of 1
    shape = (samples, 2) if name == "points" else (samples, 1, 28, 28)
    real, fake = torch.rand(2, *shape, dtype=dtype) * 2 - 1
    return script.gradient_penalty, critic, real, fake, *[torch.randint(10, (samples,))] * (name == "04")


def outcome(penalty, critic, *inputs):
    """From one seed: the penalty, the mean norm, every weight's gradient, and the next random number."""
    torch.manual_seed(5)
    value, norm = penalty(critic, *inputs)
    trained = [parameter for parameter in critic.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(value, trained, allow_unused=True)
    return [value, norm, torch.rand(()), *[torch.zeros(()) if gradient is None else gradient for gradient in gradients]]


def assert_same(penalty, *inputs, tolerance=1e-12):
    for found, wanted in zip(outcome(penalty, *inputs), outcome(penalty.formula, *inputs)):
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-3)


@fused
@pytest.mark.parametrize("samples", [1, 40])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["03", "04", "points"])
def test_same_numbers_as_the_formula(kernels, capsys, name, training, samples):
    penalty, critic, *inputs = case(name, samples)
    assert_same(penalty, critic.train(training), *inputs)
    assert "formula" not in capsys.readouterr().out
    penalty, critic, *inputs = case(name, samples, torch.float32)
    assert_same(penalty, critic.train(training), *inputs, tolerance=1e-5)


@fused
def test_derivative_by_differences(kernels):
    """The derivative by every weight of a small critic, against differences of the penalty itself."""
    torch.manual_seed(0)
    penalty = load_script("03_wgan_gp").gradient_penalty
    critic = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.3), common.Dropout(0.5), nn.Linear(4, 1)).double()
    inputs = torch.randn(2, 5, 3, dtype=torch.float64)
    _, _, _, *gradients = outcome(penalty, critic, *inputs)
    for parameter, gradient in zip(critic.parameters(), gradients):
        for index in range(parameter.numel()):
            values = []
            for step in (1e-6, -1e-6):
                parameter.data.view(-1)[index] += step
                values.append(outcome(penalty, critic, *inputs)[0].item())
                parameter.data.view(-1)[index] -= step
            wanted = gradient.expand_as(parameter).reshape(-1)[index].item()
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(wanted, abs=1e-6)


@fused
def test_where_the_gradient_is_zero(kernels):
    penalty, critic, *inputs = case("03")
    critic.model[-1].weight.data.zero_()
    value, norm, _, *gradients = outcome(penalty, critic, *inputs)
    assert value == 1 and norm == 0 and all(gradient.isfinite().all() for gradient in gradients)
    assert_same(penalty, critic, *inputs)


@fused
def test_frozen_layers(kernels):
    penalty, critic, *inputs = case("04")
    critic.model[0].requires_grad_(False)
    assert_same(penalty, critic, *inputs)


class Edited(nn.Module):
    """A critic of known layers whose forward does something else with x as well."""

    def __init__(self, change):
        super().__init__()
        self.model, self.change = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1)), change

    def forward(self, x):
        return self.change(self.model, x)


@fused
@pytest.mark.parametrize("critic", [
    nn.Sequential(nn.Conv2d(1, 2, 2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(2, 1)),
    nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1)),
    nn.Sequential(nn.Flatten(), spectral_norm(nn.Linear(4, 8)), nn.LeakyReLU(0.2), nn.Linear(8, 1)),
    Edited(lambda model, x: model(2 * x.flatten(1))),
    Edited(lambda model, x: model(x.flatten(1)) + x.flatten(1).sum(1, True)),
    Edited(lambda model, x: model(x.flatten(1)) * x.mean()),
    Edited(lambda model, x: model[2](model[1](model[0](x.flatten(1)) + 1))), Edited(lambda model, x: model(x.flatten(2))),
], ids=["convolution", "batchnorm", "parametrization", "scaled", "shortcut", "product", "shifted", "three dimensions"])
def test_other_critics_get_the_formula(kernels, capsys, critic):
    ops.say.cache_clear()
    real, fake = torch.randn(2, 6, 1, 2, 2)
    penalty = load_script("03_wgan_gp").gradient_penalty
    states = []
    for function in (penalty, penalty.formula):
        torch.manual_seed(3)
        twin = copy.deepcopy(critic)
        states.append([*outcome(function, twin, real, fake), *twin.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*states))
    assert "formula" in capsys.readouterr().out


@fused
def test_hooks_get_the_formula(kernels, capsys):
    ops.say.cache_clear()
    penalty, critic, *inputs = case("03")
    critic.model[0].register_full_backward_hook(lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(outcome(penalty, critic, *inputs), outcome(penalty.formula, critic, *inputs)))
    assert "hooks" in capsys.readouterr().out


@fused
@pytest.mark.parametrize("name", ["03_wgan_gp", "04_cgan"])
def test_fifty_steps_give_the_same_weights(kernels, name):
    script, weights = load_script(name), []
    for with_kernels in (True, False):
        torch.manual_seed(0)
        generator, critic = script.Generator().double(), script.Critic().double()
        optimizer_g = torch.optim.Adam(generator.parameters(), 1e-4, (0.0, 0.9), fused=True)
        optimizer_c = torch.optim.Adam(critic.parameters(), 1e-4, (0.0, 0.9), fused=True)

        def label():
            return [torch.randint(10, (32,))] if name == "04_cgan" else []

        def steps():
            for _ in range(50):
                real = torch.rand(32, 1, 28, 28, dtype=torch.float64) * 2 - 1
                z = torch.rand(32, 100, dtype=torch.float64) * 2 - 1
                script.critic_step(generator, critic, optimizer_c, real, *label(), z, 10.0)
                script.generator_step(generator, critic, optimizer_g, z, *label())

        if with_kernels:
            steps()
        else:
            with ops.without_kernels():
                steps()
        weights.append([*generator.parameters(), *critic.parameters()])
    assert max((a - b).abs().max().item() for a, b in zip(*weights)) < 1e-9
