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
from torch.autograd import Function

from csrc import build

DTYPES = {"cpu": {torch.float32, torch.float16, torch.bfloat16, torch.float64},
          "cuda": {torch.float32, torch.float16, torch.bfloat16}}
EPS = 1e-5  # F.instance_norm's
KERNELS = {}  # the operators in use, by type of device
SERVED = []  # what torch.compile has to take whole; said to it when kernels are chosen: its import takes a second


def choose(wanted, device):
    """Use the kernels for `device` (wanted: "fused"), or none ("reference"), or what can be had ("auto").

    Returns what it came to, in words. Raises build.Unavailable if "fused" cannot be had.
    """
    KERNELS.clear()
    if wanted == "reference":
        return "reference: PyTorch's own operations, as asked"
    try:
        build.load(device)
        kernels = describe(device)
        try_out(kernels, device)
    except build.Unavailable as reason:
        if wanted == "fused":
            raise
        return f"reference: PyTorch's own operations, no fused ones ({reason})"
    KERNELS[device] = kernels
    for apply in SERVED:
        torch.compiler.allow_in_graph(apply)
    return f"fused, for {device}"


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


@functools.cache
def describe(device):
    """The operators of binding.cpp for `device`, after telling torch.compile the shapes of their results."""
    def real(like, *shape):
        return like.new_empty(shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)

    def fake(name):
        def decorate(shapes):
            def checked(first, *others):
                if any(isinstance(t, torch.Tensor) and t.device != first.device for t in others):
                    raise RuntimeError(f"gan_{device}::{name}: expected all tensors on {first.device}")
                return shapes(first, *others)
            torch.library.register_fake(f"gan_{device}::{name}", checked)
        return decorate

    @fake("penalty")
    def _(gradient):
        return real(gradient), real(gradient, gradient.size(0))

    @fake("penalty_backward")
    def _(gradient, norms, d_penalty, d_norms):
        return torch.empty_like(gradient)

    @fake("adain")
    def _(x, scale, bias, noise, strength, slope_before, slope_after, eps):
        return torch.empty_like(x), real(x, *x.shape[:2]), real(x, *x.shape[:2])

    @fake("adain_backward")
    def _(dy, x, scale, bias, noise, strength, mean, rstd, slope_before, slope_after):
        sums = [real(x, *x.shape[:2]) for _ in range(2)]
        return torch.empty_like(x), *sums, real(x, 0 if noise is None else x.size(0), x.size(1))

    return getattr(torch.ops, f"gan_{device}")


def fused(name):
    """A decorator: serve a formula by the kernel `name`, "penalty" or "adain", with the signature of that function."""
    serve, function = {"penalty": (penalty, Penalty), "adain": (adain, AdaIN)}[name]

    def decorate(formula):
        def apply(tensor, *others):
            return function.apply(tensor, *others, formula, KERNELS[tensor.device.type])

        SERVED.append(apply)  # torch.compile would look into it and lose the second derivative
        if KERNELS:
            torch.compiler.allow_in_graph(apply)

        @functools.wraps(formula)
        def call(*arguments, **options):
            return serve(formula, apply, *arguments, **options) if KERNELS else formula(*arguments, **options)
        call.formula, call.kernel = formula, name
        return call
    return decorate


def taken(*tensors):
    """The dtype in which kernels take them all, that of PyTorch's own result; None if there are none for them.

    What inference mode has left behind goes to the formula: no graph may keep it. torch.compile cannot ask for that.
    """
    if (not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()
            and any(tensor.is_inference() for tensor in tensors)):
        return None
    device, dtype = tensors[0].device, tensors[0].dtype
    for tensor in tensors:
        if tensor.device != device:
            return None
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype if device.type in KERNELS and dtype in DTYPES[device.type] else None


def penalty(formula, apply, gradient):
    """Gradients [N, ...] -> mean((norm - 1)^2) [], norms over all but the batch [N]."""
    if not taken(gradient) or gradient.dim() < 2:
        return formula(gradient)
    result, norms = apply(gradient.contiguous())
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


def adain(formula, apply, x, scale, bias, noise=None, strength=None, slope_before=1.0, slope_after=1.0):
    """x [N, C, H, W] -> LeakyReLU(scale (x' - mu) / sigma + bias), x' = LeakyReLU(x + strength noise): [N, C, H, W].

    mu, sigma^2 - EPS: mean and variance of each channel of each sample of x'; scale, bias: [N, C]; noise:
    [N or 1, 1, H, W]; strength: [1] or [C]; a slope of 1 means no LeakyReLU. The noise gets no gradient. The result
    has x's dtype or, of several as under autocast, the widest.
    """
    dtype = taken(*[t for t in (x, scale, bias, noise, strength) if t is not None])
    fits = dtype and x.dim() == 4 and scale.shape == bias.shape == x.shape[:2] and (noise is None) == (strength is None)
    if fits:
        samples, channels, height, width = x.shape
        fits = height * width > 1
    if fits and noise is not None:  # with ==, since torch.compile of 2.11 gets `in` wrong where sizes vary
        fits = ((noise.shape == (samples, 1, height, width) or noise.shape == (1, 1, height, width))
                and (strength.shape == (1,) or strength.shape == (channels,)) and not noise.requires_grad)
    if not fits:
        return formula(x, scale, bias, noise, strength, slope_before, slope_after)
    x, scale, bias, noise, strength = cast(dtype, x, scale, bias, noise, strength)
    # Samples may lie apart, as 06 cuts them from [N, 2, H, W]. inductor fails where a graph keeps two views of one
    # tensor of varying size for the backward pass (get_stride_order, torch 2.14): a copy there, of one channel.
    if noise is not None and (torch.compiler.is_compiling() or not noise[:1].is_contiguous()):
        noise = noise.clone(memory_format=torch.contiguous_format)
    return apply(x.contiguous(), scale, bias, noise, strength, slope_before, slope_after)


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
