"""The gradient penalty of 03 and 04 against closed forms."""

import pytest
import torch

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
