"""The losses of 01 and 02 and their gradients against hand-computed numbers, also where a sigmoid saturates."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, log_expit

from conftest import load_script

LN2 = math.log(2)
LOGITS = np.array([-30.0, -2.0, 0.0, 0.5, 30.0])


def value_and_gradients(function, *logits):
    """A loss of logits [N, 1] or [N, 2] in float64, and its gradient in each of them."""
    logits = [torch.tensor(part, dtype=torch.float64).requires_grad_() for part in logits]
    loss = function(*logits)
    return loss.item(), [gradient.numpy() for gradient in torch.autograd.grad(loss, logits)]


@pytest.mark.parametrize("script", ["01_vanilla_gan", "02_dcgan"])
def test_discriminator_loss_of_chapter_3(script):
    loss = load_script(script).discriminator_loss
    value, (d_real, d_fake) = value_and_gradients(loss, LOGITS[:, None], LOGITS[:, None])
    assert value == pytest.approx(-(log_expit(LOGITS).mean() + log_expit(-LOGITS).mean()) / 2, rel=1e-12)
    np.testing.assert_allclose(d_real[:, 0], -expit(-LOGITS) / 2 / 5, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(d_fake[:, 0], expit(LOGITS) / 2 / 5, rtol=1e-9, atol=1e-12)
    assert value_and_gradients(loss, [[0]], [[0]])[0] == pytest.approx(LN2)
    assert value_and_gradients(loss, [[1]], [[-2]])[0] == pytest.approx((0.3132616875 + 0.1269280110) / 2)


@pytest.mark.parametrize("losses, logits", [("ONE_LOGIT", LOGITS[:, None]),
                                            ("TWO_LOGITS", np.stack([np.zeros(5), LOGITS], 1))])
def test_generator_loss_of_01(losses, logits):
    """Non-saturating: softplus(-l), gradient -D(-l). Saturating: -softplus(l), gradient -D(l), 0 where G is worst."""
    _, loss, _ = getattr(load_script("01_vanilla_gan"), losses)
    for kind, expected, gradient in [("non-saturating", -log_expit(LOGITS), -expit(-LOGITS)),
                                     ("saturating", log_expit(-LOGITS), -expit(LOGITS))]:
        value, (d,) = value_and_gradients(lambda fake, kind=kind: loss(fake, kind), logits)
        assert value == pytest.approx(expected.mean(), rel=1e-12)
        np.testing.assert_allclose(d[:, -1], gradient / 5, rtol=1e-9, atol=1e-12)


def test_two_logit_discriminator_loss_is_a_sum():
    """Chapter 11 adds the cross-entropies: 2 ln 2 when D cannot tell. By hand: -ln(e^2 / (e^2 + e^-1)) etc."""
    loss, _, _ = load_script("01_vanilla_gan").TWO_LOGITS
    assert value_and_gradients(loss, [[0, 0]], [[0, 0]])[0] == pytest.approx(2 * LN2)
    value, (d_real, d_fake) = value_and_gradients(loss, [[-1, 2]], [[1, 0]])
    assert value == pytest.approx(0.0485873516 + 0.3132616875)
    np.testing.assert_allclose(d_real, [[0.0474258732, -0.0474258732]], rtol=1e-8)
    np.testing.assert_allclose(d_fake, [[-0.2689414214, 0.2689414214]], rtol=1e-8)
    assert value_and_gradients(loss, [[30, 0]], [[0, 30]])[0] == pytest.approx(60)
