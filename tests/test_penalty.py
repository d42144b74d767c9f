"""The gradient penalty of 03 and 04 against closed forms; the Dropout of their critics and of 01's."""

import pytest
import torch

import common
from conftest import load_script

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
