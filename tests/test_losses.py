"""Each loss and its gradient against hand-computed numbers, also where a sigmoid saturates."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, log_expit

from conftest import load_script

LN2 = math.log(2)
LOGITS = [-30.0, -2.0, 0.0, 0.5, 30.0]


def value_and_gradient(function, *columns):
    """Loss and d loss / d input for inputs [N, 1] or [N, 2] in float64."""
    inputs = [torch.tensor(column, dtype=torch.float64).reshape(-1, width).requires_grad_() for column, width in columns]
    loss = function(*inputs)
    return loss.item(), [gradient.numpy() for gradient in torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("script", ["01_vanilla_gan", "02_dcgan"])
def test_discriminator_loss_of_chapter_3(script):
    loss = load_script(script).discriminator_loss
    value, (d_real, d_fake) = value_and_gradient(loss, (LOGITS, 1), (LOGITS, 1))
    logits = np.array(LOGITS)
    expected = -(log_expit(logits).mean() + log_expit(-logits).mean()) / 2
    assert value == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(d_real[:, 0], -expit(-logits) / 2 / 5, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(d_fake[:, 0], expit(logits) / 2 / 5, rtol=1e-9, atol=1e-12)
    assert value_and_gradient(loss, ([0], 1), ([0], 1))[0] == pytest.approx(LN2)
    assert value_and_gradient(loss, ([1], 1), ([-2], 1))[0] == pytest.approx((0.3132616875 + 0.1269280110) / 2)


@pytest.mark.parametrize("variant, width", [("bce", 1), ("keras", 1), ("points", 1), ("two-logit", 2)])
def test_generator_losses(variant, width):
    """Non-saturating: softplus(-l), gradient -D(-l). Saturating: -softplus(l), gradient -D(l), zero where G is worst."""
    losses = load_script("01_vanilla_gan").losses
    logits = np.array(LOGITS)
    outputs = logits[:, None] if width == 1 else np.stack([np.zeros(5), logits], 1)     # l = l_1 - l_0
    for kind, expected, gradient in [("non-saturating", -log_expit(logits), -expit(-logits)),
                                     ("saturating", log_expit(-logits), -expit(logits))]:
        value, (d,) = value_and_gradient(losses(variant, kind)[1], (outputs, width))
        assert value == pytest.approx(expected.mean(), rel=1e-12)
        np.testing.assert_allclose(d[:, -1], gradient / 5, rtol=1e-9, atol=1e-12)
    one = [[0.0, -30.0][-width:]]
    assert abs(value_and_gradient(losses(variant, "non-saturating")[1], (one, width))[1][0][0, -1]) == pytest.approx(1)
    assert abs(value_and_gradient(losses(variant, "saturating")[1], (one, width))[1][0][0, -1]) < 1e-12


def test_dcgan_generator_loss():
    value, (d,) = value_and_gradient(load_script("02_dcgan").generator_loss, (LOGITS, 1))
    assert value == pytest.approx(-log_expit(np.array(LOGITS)).mean(), rel=1e-12)
    np.testing.assert_allclose(d[:, 0], -expit(-np.array(LOGITS)) / 5, rtol=1e-9, atol=1e-12)


def test_two_logit_discriminator_loss_is_a_sum():
    """Chapter 11 adds the two cross-entropies: 2 ln 2 when D cannot tell. By hand: -ln(e^2 / (e^2 + e^-1)) etc."""
    loss, _, _ = load_script("01_vanilla_gan").losses("two-logit", "non-saturating")
    assert value_and_gradient(loss, ([[0, 0]], 2), ([[0, 0]], 2))[0] == pytest.approx(2 * LN2)
    value, (d_real, d_fake) = value_and_gradient(loss, ([[-1, 2]], 2), ([[1, 0]], 2))
    assert value == pytest.approx(0.0485873516 + 0.3132616875)
    np.testing.assert_allclose(d_real, [[0.0474258732, -0.0474258732]], rtol=1e-8)
    np.testing.assert_allclose(d_fake, [[-0.2689414214, 0.2689414214]], rtol=1e-8)
    assert value_and_gradient(loss, ([[30, 0]], 2), ([[0, 30]], 2))[0] == pytest.approx(60)


def test_probability():
    one, two = (load_script("01_vanilla_gan").losses(variant, "saturating")[2] for variant in ("bce", "two-logit"))
    torch.testing.assert_close(one(torch.tensor([[0.0], [math.log(3)]])), torch.tensor([0.5, 0.75]))
    torch.testing.assert_close(two(torch.tensor([[1.0, 1.0], [0.0, math.log(3)]])), torch.tensor([0.5, 0.75]))


def test_erratum_6_probabilities_saturate():
    """What the text's Sigmoid + BCELoss does to D's gradient at a fake of logit 20; ours is 1, halved by the mean of two."""
    logit = torch.tensor([[20.0]], requires_grad=True)
    torch.nn.BCELoss()(logit.sigmoid(), torch.zeros(1, 1)).backward()
    assert logit.grad.item() == 0
    _, (_, d_fake) = value_and_gradient(load_script("02_dcgan").discriminator_loss, ([0], 1), ([20], 1))
    assert d_fake.item() == pytest.approx(0.5, rel=1e-6)
