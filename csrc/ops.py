"""The fused kernels' Python face: a plain PyTorch formula may be served by a kernel that computes the same.

    @fused("penalty")
    def penalty_of(gradient):
        norm = gradient.flatten(1).norm(2, dim=1)
        return (norm - 1).square().mean(), norm

Until choose() has found kernels for the device of its first argument, and for arguments that they do not take,
such a function is the formula below the decorator. It remains `penalty_of.formula` in any case; `penalty_of.kernel` is
the kernel's name.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from csrc import build

DTYPES = {"cpu": {torch.float32, torch.float16, torch.bfloat16, torch.float64},
          "cuda": {torch.float32, torch.float16, torch.bfloat16}}
EPS = 1e-5  # F.instance_norm's
KERNELS = {}  # the operators in use, by type of device


def choose(wanted, device):
    """Use the kernels for `device` (wanted: "fused"), or none ("reference"), or what can be had ("auto").

    Prints what it came to; returns "fused" or "reference". Raises build.Unavailable if "fused" cannot be had.
    """
    KERNELS.clear()
    outcome = "reference: PyTorch's own operations, as asked"
    try:
        if wanted != "reference":
            build.load(device)
            kernels = getattr(torch.ops, f"gan_{device}")
            try_out(kernels, device)
            KERNELS[device], outcome = kernels, f"fused, for {device}"
    except build.Unavailable as reason:
        if wanted == "fused":
            raise build.Unavailable(f"no fused kernels: {reason}") from None
        outcome = f"reference: PyTorch's own operations, no fused ones ({reason})"
    print(f"kernels {outcome}")
    return "fused" if KERNELS else "reference"


def try_out(kernels, device):
    """Raises build.Unavailable where compiled kernels do not run: under an old driver, on another GPU."""
    try:
        kernels.penalty(torch.ones(1, 1, device=device))
    except RuntimeError as error:
        raise build.Unavailable(f"they do not run: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def without_kernels():
    """For a while the formulas alone."""
    before = dict(KERNELS)
    KERNELS.clear()
    try:
        yield
    finally:
        KERNELS.update(before)


def fused(name):
    """A decorator: serve a formula by the kernel `name`, "penalty" or "adain", with the signature of that function."""
    serve = {"penalty": penalty, "adain": adain}[name]

    def decorate(formula):
        @functools.wraps(formula)
        def call(*arguments, **options):
            plain = not KERNELS or torch.compiler.is_compiling()  # torch.compile fuses the formula itself
            return formula(*arguments, **options) if plain else serve(formula, *arguments, **options)
        call.formula, call.kernel = formula, name
        return call
    return decorate


def taken(*tensors):
    """The dtype in which kernels take them all, that of PyTorch's own result; None if there are none for them.

    What inference mode has left behind goes to the formula: no graph may keep it.
    """
    device = tensors[0].device
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    usual = torch.is_inference_mode_enabled() or not any(tensor.is_inference() for tensor in tensors)
    here = device.type in KERNELS and all(tensor.device == device for tensor in tensors)
    return dtype if usual and here and dtype in DTYPES[device.type] else None


def penalty(formula, gradient):
    """Gradients [N, ...] -> mean((norm - 1)^2) [], norms over all but the batch [N]."""
    if not taken(gradient) or gradient.dim() < 2:
        return formula(gradient)
    result, norms = Penalty.apply(gradient.contiguous(), formula, KERNELS[gradient.device.type])
    return tuple(cast(gradient.dtype, result, norms))


class Penalty(Function):
    @staticmethod
    def forward(ctx, gradient, formula, kernels):
        result, norms = kernels.penalty(gradient)
        ctx.save_for_backward(gradient, norms)
        ctx.formula, ctx.kernels = formula, kernels
        ctx.set_materialize_grads(False)
        return result, norms

    @staticmethod
    def backward(ctx, d_penalty, d_norms):
        gradient, norms = ctx.saved_tensors
        if d_penalty is None and d_norms is None:
            return None, None, None
        if torch.is_grad_enabled():
            return *derivative(ctx.formula, [gradient], [d_penalty, d_norms]), None, None
        d_penalty = norms.new_zeros(()) if d_penalty is None else d_penalty
        d_norms = d_norms if d_norms is None else d_norms.contiguous()
        return ctx.kernels.penalty_backward(gradient, norms, d_penalty, d_norms), None, None


def adain(formula, x, scale, bias, noise=None, strength=None, slope_before=1.0, slope_after=1.0):
    """x [N, C, H, W] -> LeakyReLU(scale (x' - mu) / sigma + bias), x' = LeakyReLU(x + strength noise): [N, C, H, W].

    mu, sigma^2 - EPS: mean and variance of each channel of each sample of x'; scale, bias: [N, C]; noise:
    [N or 1, 1, H, W]; strength: [1] or [C]; a slope of 1 means no LeakyReLU. The noise gets no gradient. The result
    has x's dtype or, of several as under autocast, the widest.
    """
    dtype = taken(*[t for t in (x, scale, bias, noise, strength) if t is not None])
    fits = (dtype and x.dim() == 4 and x.shape[2:].numel() > 1 and scale.shape == bias.shape == x.shape[:2]
            and (noise is None) == (strength is None))
    if fits and noise is not None:
        fits = (noise.shape in [(samples, 1, *x.shape[2:]) for samples in (1, len(x))]
                and strength.shape in [(1,), x.shape[1:2]] and not noise.requires_grad)
    if not fits:
        return formula(x, scale, bias, noise, strength, slope_before, slope_after)
    x, scale, bias, noise, strength = cast(dtype, x, scale, bias, noise, strength)
    if noise is not None and not noise[:1].is_contiguous():  # samples may lie apart, as 06 cuts them from [N, 2, H, W]
        noise = noise.contiguous()
    kernels = KERNELS[x.device.type]
    return AdaIN.apply(x.contiguous(), scale, bias, noise, strength, slope_before, slope_after, formula, kernels)


class AdaIN(Function):
    @staticmethod
    def forward(ctx, x, scale, bias, noise, strength, slope_before, slope_after, formula, kernels):
        slopes = slope_before, slope_after
        y, mean, rstd = kernels.adain(x, *as_computed(scale, bias), noise, *as_computed(strength), *slopes, EPS)
        ctx.save_for_backward(x, scale, bias, noise, strength, mean, rstd)
        ctx.formula, ctx.kernels, ctx.slopes = formula, kernels, slopes
        return y

    @staticmethod
    def backward(ctx, dy):
        *inputs, mean, rstd = ctx.saved_tensors
        x, scale, bias, noise, strength = inputs
        dy = dy.contiguous()  # for the formula, too: F.instance_norm's derivative is wrong for one channels_last sample
        if torch.is_grad_enabled():
            return *derivative(ctx.formula, inputs, [dy], *ctx.slopes), None, None, None, None
        dx, d_scale, d_bias, d_strength = ctx.kernels.adain_backward(
            dy, x, *as_computed(scale, bias), noise, *as_computed(strength), mean, rstd, *ctx.slopes)
        # In two steps: a sum of 32,768 numbers or more PyTorch cuts into as many as there are threads.
        d_strength = None if strength is None else d_strength.sum(0).sum_to_size(strength.shape)
        d_scale, d_bias, d_strength = cast(x.dtype, d_scale, d_bias, d_strength)
        return dx, d_scale, d_bias, None, d_strength, None, None, None, None


def cast(dtype, *tensors):
    """In this dtype; None stays None. Even a .to that has nothing to do takes a microsecond."""
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors]


def as_computed(*tensors):
    """Contiguous and in the type that the kernels compute in, float32, or float64 for float64; None stays None."""
    return [t if t is None else (t if t.dtype == torch.float64 else t.float()).contiguous() for t in tensors]


def derivative(formula, inputs, gradients, *options):
    """The derivative of formula(*inputs, *options), as one that can be differentiated again.

    inputs: tensors or None; gradients: one or None per result. Returns a list, None where no gradient is required.
    A backward pass under create_graph=True takes this one: through a kernel's it would silently be a constant.
    """
    inputs = [None if t is None else t.view_as(t) for t in inputs]  # apart, even where one was computed from another
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    outputs = formula(*inputs, *options)
    pairs = zip([outputs] if isinstance(outputs, torch.Tensor) else outputs, gradients)
    outputs, gradients = zip(*[(output, gradient.to(output.dtype)) for output, gradient in pairs
                               if gradient is not None])
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


class Dropout(nn.Module):
    """nn.Dropout(0.5); on the CPU its masks come from random bytes, one bit of each, in an eighth of the time."""

    def forward(self, x):
        return x * self.mask(x) if self.training and x.device.type == "cpu" else F.dropout(x, 0.5, self.training)

    def mask(self, x):
        """What multiplies x: 0 or 2, each with probability 0.5; 1 in eval mode."""
        if not self.training or x.device.type != "cpu":
            return F.dropout(torch.ones_like(x), 0.5, self.training)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_()  # random but for the highest bit
        return (words.view(torch.uint8)[:x.numel()] & 2).view(x.shape).to(x.dtype)
