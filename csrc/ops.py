"""The fused operations' Python face: a plain PyTorch formula may be served by one that computes the same, faster.

    @fused("gradient_penalty")
    def gradient_penalty(critic, real, fake): ...

Until choose() has found kernels for the device of its tensors, and for arguments that the operation does not take, such
a function is the formula below the decorator. It remains `gradient_penalty.formula` in any case.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import Function, once_differentiable
from torch.overrides import TorchFunctionMode, wrap_torch_function
from tqdm import tqdm

from csrc import build

DTYPES = {"cpu": {torch.float32, torch.float16, torch.bfloat16, torch.float64},
          "cuda": {torch.float32, torch.float16, torch.bfloat16}}
KERNELS = {}  # the operators in use, by type of device
NAMES = []  # of the formulas under @fused


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
            kernels.penalty(*torch.ones(2, 1, 1, device=device))  # they may not run: an old driver, another GPU
            KERNELS[device], outcome = kernels, f"fused, for {device}: {', '.join(dict.fromkeys(NAMES)) or 'nothing'}"
    except (build.Unavailable, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if wanted == "fused":
            raise build.Unavailable(f"no fused kernels: {reason}") from None
        outcome = f"reference: PyTorch's own operations, no fused ones ({reason})"
    print(f"kernels {outcome}")
    return "fused" if KERNELS else "reference"


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
    """A decorator: serve a formula by the operation `name`, gradient_penalty or adain, with that one's arguments."""
    serve = {"gradient_penalty": gradient_penalty, "adain": adain}[name]

    def decorate(formula):
        @functools.wraps(formula)
        def call(*arguments, **options):
            plain = not KERNELS or torch.compiler.is_compiling()  # torch.compile fuses the formula itself
            return formula(*arguments, **options) if plain else serve(formula, *arguments, **options)
        call.formula, call.kernel = formula, name
        NAMES.append(name)
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


@wrap_torch_function(lambda x, p: (x,))  # so that Walk meets it
def dropout(x, p):
    """F.dropout in training; for p = 0.5 on the CPU the masks are random bits, drawn in an eighth of the time."""
    if p != 0.5 or x.device.type != "cpu":
        return F.dropout(x, p)
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_()  # random but for the highest bit
    return x * words.view(torch.uint8)[:x.numel()].bitwise_and_(2).view(x.shape).to(x.dtype)  # 0 or 2


class Dropout(nn.Dropout):
    """nn.Dropout by the function above."""

    def forward(self, x):
        return dropout(x, self.p) if self.training else x


class Walk(TorchFunctionMode):
    """Follows x through a critic: meets every function of torch that is called, and keeps what makes the gradient.

    layers: [weight, slopes] of each Linear layer and the units after it, slopes [N, units] or 1. columns: how many
    inputs of the first layer are x; the others are labels. odd: a function of x that no critic of Linear, LeakyReLU and
    Dropout layers has.
    """

    def __init__(self, x):
        super().__init__()
        self.at, self.passed, self.layers, self.columns, self.odd = x, {id(x): x}, [], None, None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, x, slopes = kwargs or {}, self.at, None
        parts = [part for arg in (*args, *kwargs.values()) for part in (arg if type(arg) in (list, tuple) else [arg])]
        used = [part for part in parts if id(part) in self.passed]
        plain = len(used) == 1 and args and used[0] is x is parts[0]
        if plain and function in SLOPES:
            slopes = SLOPES[function](*args, **kwargs)
        result = function(*args, **kwargs) if slopes is None else x * slopes
        if not used or not isinstance(result, torch.Tensor):  # labels alone; x.shape
            return result
        if slopes is not None and self.layers:
            self.layers[-1][1] = self.layers[-1][1] * slopes
        elif plain and function is F.linear and isinstance(args[1], nn.Parameter):
            self.layers.append([args[1], 1])
        elif plain and function is torch.cat and not self.layers and result.dim() == 2:
            self.columns = x.size(1)
        elif not plain or function is not torch.Tensor.flatten or self.layers:
            self.odd = function.__name__
        self.at = self.passed[id(result)] = result
        return result


SLOPES = {  # what a function multiplies each number of x by
    F.leaky_relu: lambda x, negative_slope=0.01, inplace=False:
        torch.ops.aten.leaky_relu_backward(torch.ones_like(x), x, negative_slope, False),
    F.dropout: lambda x, *options, **others: F.dropout(torch.ones_like(x), *options, **others),
    dropout: lambda x, p: dropout(torch.ones_like(x), p)}
LAYERS = (nn.Sequential, nn.Flatten, nn.Linear, nn.LeakyReLU, nn.Dropout, Dropout, nn.Embedding)


def gradient_penalty(formula, critic, real, fake, *labels):
    """mean((||g|| - 1)^2) and the mean of ||g||, g being the critic's gradient by x at points between real and fake.

    real, fake: [N, ...]; labels: what else the critic takes. A critic of Linear, LeakyReLU and Dropout layers is linear
    near any x: C(x) = w4 S3 W3 S2 W2 S1 W1 x + ..., where S is diagonal: each unit's slope of LeakyReLU times its mask
    of Dropout. So g = v W1 with v = w4 S3 W3 S2 W2 S1. backward() differentiates that product once, where the formula
    needs the derivative of a derivative (docs/performance.md). Numbers are drawn in the formula's order. Any other
    critic, also one with hooks or parametrizations, gets the formula, and a line says so.
    """
    modules, device = list(critic.modules()), real.device
    odd = next((type(module).__name__ for module in modules[1:] if type(module) not in LAYERS), None)
    if any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
           for part in modules):
        odd = "hooks"
    if torch.is_autocast_enabled(device.type) or not taken(real, fake, *critic.parameters()):
        odd = "another dtype or device"
    if not odd:
        numbers = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
        before = numbers.get_state()
        with torch.no_grad():
            epsilon = torch.rand((len(real),) + (1,) * (real.dim() - 1), device=device)
            with Walk(torch.lerp(fake, real, epsilon.to(real.dtype))) as walk:
                scores = critic(walk.at, *labels)
        usual = scores is walk.at and walk.layers and scores.shape[:-1] == real.shape[:1]
        odd = walk.odd or (None if usual else "another result")
        if odd:
            numbers.set_state(before)
    if odd:
        say(f"kernels the formula computes gradient_penalty: the fused one does not take a critic with {odd}")
        return formula(critic, real, fake, *labels)
    v = torch.ones_like(scores)
    for weight, slopes in reversed(walk.layers[1:]):
        v = (v * slopes) @ weight
    weight, slopes = walk.layers[0]
    penalty, norms = Penalty.apply(v * slopes, weight[:, :walk.columns], KERNELS[device.type])  # without the labels
    return penalty.to(v.dtype), norms.mean().to(v.dtype)


say = functools.cache(tqdm.write)  # each line once


class Penalty(Function):
    """v [N, units], weight [units, inputs] -> mean((norm - 1)^2) [], the norms of the rows of g = v weight [N].

    g is not formed: ||g||^2 = u v^T with u = v weight weight^T. multi_dot takes three matrices in the cheapest order,
    for more samples than units weight weight^T first.
    """

    @staticmethod
    def forward(ctx, v, weight, kernels):
        u = torch.linalg.multi_dot([v, weight, weight.T])
        penalty, norms = kernels.penalty(u, v)
        ctx.save_for_backward(u, v, weight, norms)
        ctx.kernels = kernels
        return penalty, norms

    @staticmethod
    @once_differentiable
    def backward(ctx, d_penalty, d_norms):
        u, v, weight, norms = ctx.saved_tensors  # d norm / dv = u / norm, d norm / d weight = v^T (v weight) / norm
        d_v, of_v = (ctx.kernels.penalty_backward(t, norms, d_penalty, d_norms.contiguous()) for t in (u, v))
        return d_v, torch.linalg.multi_dot([of_v.T, v, weight]), None


def adain(formula, x, scale, bias, noise=None, strength=None, slope=1.0):
    """x [N, C, H, W] -> LeakyReLU(scale (x' - mu) / sigma + bias), x' = x + strength noise: [N, C, H, W].

    mu, sigma^2 - 1e-5: mean and variance of each channel of each sample of x'; scale, bias: [N, C]; noise:
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
        return formula(x, scale, bias, noise, strength, slope)
    x, scale, bias, noise, strength = cast(dtype, x, scale, bias, noise, strength)
    if noise is not None and not noise[:1].is_contiguous():  # samples may lie apart, as 06 cuts them from [N, 2, H, W]
        noise = noise.contiguous()
    kernels = KERNELS[x.device.type]
    return AdaIN.apply(x.contiguous(), scale, bias, noise, strength, slope, formula, kernels)


class AdaIN(Function):
    @staticmethod
    def forward(ctx, x, scale, bias, noise, strength, slope, formula, kernels):
        y, mean, rstd = kernels.adain(x, *as_computed(scale, bias), noise, *as_computed(strength), slope, 1e-5)
        ctx.save_for_backward(x, scale, bias, noise, strength, mean, rstd)
        ctx.formula, ctx.kernels, ctx.slope = formula, kernels, slope
        return y

    @staticmethod
    def backward(ctx, dy):
        *inputs, mean, rstd = ctx.saved_tensors
        x, scale, bias, noise, strength = inputs
        dy = dy.contiguous()  # for the formula, too: F.instance_norm's derivative is wrong for one channels_last sample
        if torch.is_grad_enabled():
            return *derivative(ctx.formula, inputs, dy, ctx.slope), None, None, None
        dx, d_scale, d_bias, d_strength = ctx.kernels.adain_backward(
            dy, x, *as_computed(scale, bias), noise, *as_computed(strength), mean, rstd, ctx.slope)
        # In two steps: a sum of 32,768 numbers or more PyTorch cuts into as many as there are threads.
        d_strength = None if strength is None else d_strength.sum(0).sum_to_size(strength.shape)
        d_scale, d_bias, d_strength = cast(x.dtype, d_scale, d_bias, d_strength)
        return dx, d_scale, d_bias, None, d_strength, None, None, None


def cast(dtype, *tensors):
    """In this dtype; None stays None. Even a .to that has nothing to do takes a microsecond."""
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors]


def as_computed(*tensors):
    """Contiguous and in the type that the kernels compute in, float32, or float64 for float64; None stays None."""
    return [t if t is None else (t if t.dtype == torch.float64 else t.float()).contiguous() for t in tensors]


def derivative(formula, inputs, gradient, *options):
    """The derivative of formula(*inputs, *options), as one that can be differentiated again.

    inputs: tensors or None. Returns a list, None where no gradient is required. A backward pass under create_graph=True
    takes this one: through a kernel's it would silently be a constant.
    """
    inputs = [None if t is None else t.view_as(t) for t in inputs]  # apart, even where one was computed from another
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    output = formula(*inputs, *options)
    found = iter(torch.autograd.grad(output, wanted, gradient.to(output.dtype), create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
