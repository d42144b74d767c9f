"""The gradient penalty of 03 and 04 against closed forms."""

import inspect

import pytest
import torch

import common
from conftest import load_script

CRITICS = [("03_wgan_gp", "Critic", (1, 28, 28)), ("03_wgan_gp", "ConvCritic", (1, 28, 28)),
           ("03_wgan_gp", "PointsCritic", (2,)), ("04_cgan", "Critic", (1, 28, 28))]


def penalty_of(script, critic, real, fake):
    """The penalty function of a script, with some labels where it takes them."""
    penalty = load_script(script).gradient_penalty
    return penalty(critic, real, fake, torch.arange(len(real)) % 10) if script == "04_cgan" else penalty(critic, real, fake)


@pytest.mark.parametrize("script, shape", [("03_wgan_gp", (1, 28, 28)), ("03_wgan_gp", (3, 5, 7)), ("03_wgan_gp", (2,)),
                                           ("04_cgan", (1, 28, 28)), ("04_cgan", (3, 5, 7))])
def test_linear_critic(script, shape):
    """C(x) = a . x has the gradient a everywhere: norm ||a||, penalty (||a|| - 1)^2."""
    a = torch.linspace(-1, 2, torch.Size(shape).numel())
    real, fake = torch.randn(2, 6, *shape)
    penalty, norm = penalty_of(script, lambda x, *labels: x.flatten(1) @ a, real, fake)
    torch.testing.assert_close(norm, a.norm())
    torch.testing.assert_close(penalty, (a.norm() - 1).square())


@pytest.mark.parametrize("script", ["03_wgan_gp", "04_cgan"])
def test_quadratic_critic_and_the_weights_gradient(script):
    """C(x) = s/2 ||x||^2 at real = fake = x: norms s ||x||, d penalty / ds = mean 2 (s ||x|| - 1) ||x||."""
    x = torch.randn(5, 1, 2, 3)
    length = x.flatten(1).norm(dim=1)
    s = torch.tensor(0.7, requires_grad=True)
    penalty, norm = penalty_of(script, lambda x, *labels: s / 2 * x.flatten(1).square().sum(1, keepdim=True), x, x.clone())
    penalty.backward()
    torch.testing.assert_close(norm, (0.7 * length).mean())
    torch.testing.assert_close(penalty, (0.7 * length - 1).square().mean())
    torch.testing.assert_close(s.grad, (2 * (0.7 * length - 1) * length).mean())


@pytest.mark.parametrize("script, name, shape", CRITICS)
def test_constant_critic_stays_finite(script, name, shape):
    """All weights zero: norm 0, penalty 1, and no NaN in any gradient."""
    critic = getattr(load_script(script), name)()
    for parameter in critic.parameters():
        torch.nn.init.zeros_(parameter)
    penalty, norm = penalty_of(script, critic, *torch.randn(2, 3, *shape))
    penalty.backward()
    assert (penalty.item(), norm.item()) == (1, 0)
    gradients = [parameter.grad for parameter in critic.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("script", ["03_wgan_gp", "04_cgan"])
def test_xhat_lies_between_real_and_fake(script):
    """xhat = epsilon x + (1 - epsilon) G(z): one epsilon per sample, uniform on (0, 1)."""
    seen = []

    def critic(x, *labels):
        seen.append(x.detach())
        return x.flatten(1).sum(1)

    torch.manual_seed(0)
    real, fake = torch.ones(4000, 1, 2, 2), torch.full((4000, 1, 2, 2), -1.0)
    penalty_of(script, critic, real, fake)
    epsilon = (seen[0].flatten(1) + 1) / 2
    assert torch.equal(epsilon, epsilon[:, :1].expand(-1, 4))
    ordered = epsilon[:, 0].sort().values
    assert 0 <= ordered[0] and ordered[-1] <= 1
    assert (ordered - torch.linspace(0, 1, 4000)).abs().max() < 0.03      # Kolmogorov's distance; 1 % would exceed 0.026


def test_the_formula_of_04_is_that_of_03():
    """Its decorator, by which the fused kernel serves it, included."""
    first, second = (load_script(script).penalty_of for script in ("03_wgan_gp", "04_cgan"))
    assert inspect.getsource(first) == inspect.getsource(second) and first.kernel == second.kernel == "penalty"


def terms(script, critic, real, fake, explicit):
    """W, the penalty and the mean norm in both ways, from the same epsilon; and the gradients of their sum."""
    module, c = load_script(script), [torch.arange(len(real)) % 10] * (script == "04_cgan")
    torch.manual_seed(1)
    if explicit:
        values = module.explicit_terms(critic, real, fake, *c)
    else:
        values = (critic(real, *c).mean() - critic(fake, *c).mean(), *module.gradient_penalty(critic, real, fake, *c))
    loss = -values[0] + 10 * values[1] + 0.3 * values[2]
    gradients = torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)
    return values, [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, critic.parameters(), strict=True)]


@pytest.fixture
def float64():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@pytest.mark.parametrize("script", ["03_wgan_gp", "04_cgan"])
@pytest.mark.parametrize("case", ["no dropout", "dropout", "zero norm"])
def test_the_product_is_the_derivative(script, case, float64, monkeypatch):
    """explicit_terms equals autograd's, values and gradients, in float64; also where the gradient's norm is 0."""
    torch.manual_seed(0)
    critic = load_script(script).Critic()
    if case == "dropout":  # the same masks however the samples are grouped
        mask = (torch.arange(128) * 7 % 5 > 1) * 2.0
        monkeypatch.setattr(common.Dropout, "mask", lambda layer, x: mask.to(x).expand_as(x))
    else:
        critic.eval()
    if case == "zero norm":
        torch.nn.init.zeros_(critic.model[-1].weight)
    real, fake = torch.rand(2, 9, 1, 28, 28) * 2 - 1
    (values, gradients), (expected, of_autograd) = (terms(script, critic, real, fake, explicit) for explicit in (True, False))
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, of_autograd, rtol=1e-9, atol=1e-13)
    assert (expected[2] == 0) == (case == "zero norm") and max(g.abs().max() for g in gradients) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_from_random_bytes(dtype):
    """Half of the numbers, at any size; neither neighbours nor samples nor calls have anything in common."""
    torch.manual_seed(0)
    layer = common.Dropout()
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
    assert torch.equal(layer.eval()(x), x) and layer.mask(x).unique().tolist() == [1]
