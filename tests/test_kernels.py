"""The fused kernels as PyTorch sees them, against the scripts' formulas in float64: on the CPU, with -m gpu on a GPU."""

import collections
import contextlib
import os
import shutil
import subprocess
import sys

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import common
from conftest import load_script
from csrc import ops

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of the norm
penalty_of = load_script("03_wgan_gp").penalty_of
adain = load_script("06_stylegan_blocks").adain


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def kernels(device):
    """The operators; a failure, not a skip, where they cannot be built: every test below would compare PyTorch with itself."""
    ops.choose("fused", device)
    torch._dynamo.reset()  # it would count the recompilations of all tests
    with torch.device("cuda") if device == "cuda" else contextlib.nullcontext():  # tensors are made there
        yield getattr(torch.ops, f"gan_{device}")


class Calls(TorchDispatchMode):
    """Counts the calls of operators of csrc/."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace.startswith("gan_"):
            self.count[str(function).split(".")[1]] += 1
        return function(*arguments, **(options or {}))


def difference(found, exact):
    """The largest ||a - b|| / ||b|| of two lists of tensors, of which the second may be on the CPU."""
    assert [a.shape for a in found] == [b.shape for b in exact]
    pairs = [(a.double().to(b.device), b) for a, b in zip(found, exact)]
    return torch.stack([(a - b).norm() / b.norm().clamp(min=1e-30) for a, b in pairs]).max()  # NaN stays


def penalty_and_gradient(function, gradient, **options):
    """By both results, so that norms are differentiated, too."""
    penalty, norms = function(gradient)
    weights = torch.arange(1, len(norms) + 1).to(norms)
    return [penalty, norms, *torch.autograd.grad(1.75 * penalty + (weights * norms).sum(), gradient, **options)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(5, 1), (1, 1), (300, 784), (7, 3, 5, 5), (2, 100_003), (1500, 9), (1057, 784), (1500, 896), (3, 2**17), (1060, 8300)])
def test_penalty(shape, dtype):
    columns = torch.Size(shape[1:]).numel()
    gradient = (1.5 * torch.randn(shape) / columns**0.5).to(dtype)
    found = penalty_and_gradient(penalty_of, gradient.clone().requires_grad_())
    exact = penalty_and_gradient(penalty_of.formula, gradient.double().cpu().requires_grad_())
    assert difference(found, exact) < TOLERANCE[dtype]
    assert all(value.dtype == dtype for value in found)


def adain_inputs(size, dtype, noise="own", strength=1, mean=0.5, style=torch.Tensor.contiguous):
    x = torch.randn(3, 5, *size) + mean
    tensors = [x, 1 + 0.3 * torch.randn(3, 5), torch.randn(3, 5)]
    if noise != "none":
        noise = torch.randn(1 if noise == "shared" else 3, 2, *size)[:, 1:]  # strided, as 06 cuts it
        tensors += [noise, torch.randn(strength)]
    return [style(tensor.to(dtype)) if tensor is x else tensor.to(dtype) for tensor in tensors]


def adain_and_gradients(function, tensors, *slopes):
    inputs = [tensor.detach().clone().requires_grad_(i != 3) if i != 3 else tensor for i, tensor in enumerate(tensors)]
    noise = inputs[3:] if len(inputs) > 3 else [None, None]
    y = function(*inputs[:3], *noise, *slopes)
    dy = torch.arange(y.numel()).mul(37).sin().view_as(y).bfloat16()  # the same in every dtype
    return [y, *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy.to(y))]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("noise, strength", [("none", 0), ("own", 1), ("own", 5), ("shared", 5)])
@pytest.mark.parametrize("size", [(1, 2), (4, 4), (7, 7), (8, 8), (16, 16), (33, 31), (99, 131)])
@pytest.mark.parametrize("slopes", [(1.0, 1.0), (1.0, 0.2), (0.2, 1.0), (0.3, 0.1)])
def test_adain(size, noise, strength, slopes, dtype):
    torch.manual_seed(0)
    tensors = adain_inputs(size, dtype, noise, strength)
    found = adain_and_gradients(adain, tensors, *slopes)
    exact = adain_and_gradients(adain.formula, [tensor.double().cpu() for tensor in tensors], *slopes)
    if size == (1, 2):  # two pixels normalise to +-1 whatever they are: the derivative is next to nothing
        found, exact = [[*values[:1], *values[2:4]] for values in (found, exact)]
    assert difference(found, exact) < 5 * TOLERANCE[dtype], [difference([a], [b]) for a, b in zip(found, exact)]
    assert all(value.dtype == dtype for value in found)


@pytest.mark.parametrize("style", [
    lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    lambda x: torch.cat([x, x], 3)[..., :x.size(3)], lambda x: torch.cat([x[:1] * 0, x])[1:]])
def test_any_layout(style):
    tensors = adain_inputs((6, 10), torch.float32, style=style)
    assert not tensors[0].is_contiguous() or tensors[0].storage_offset()
    exact = adain_and_gradients(adain.formula, [tensor.double() for tensor in tensors], 1.0, 0.2)
    assert difference(adain_and_gradients(adain, tensors, 1.0, 0.2), exact) < 1e-5
    assert difference(penalty_and_gradient(penalty_of, tensors[0].requires_grad_()),
                      penalty_and_gradient(penalty_of.formula, tensors[0].detach().double().requires_grad_())) < 3e-6


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_each_result_and_expanded_ones(create_graph):
    """That of a sum or a mean is one number, expanded; under create_graph another piece of code computes it."""
    gradient, (x, *styles) = torch.randn(4, 5, 3, requires_grad=True), adain_inputs((6, 10), torch.float32)
    x.requires_grad_()
    for use in (lambda result: result[0], lambda result: result[1].sum(), lambda result: result[1].mean(), lambda result: result[1].square().sum()):
        found, exact = [torch.autograd.grad(use(function(gradient)), gradient, create_graph=create_graph)
                        for function in (penalty_of, penalty_of.formula)]
        torch.testing.assert_close(found, exact)
    torch.testing.assert_close(penalty_and_gradient(penalty_of, gradient, create_graph=create_graph),
                               penalty_and_gradient(penalty_of.formula, gradient))
    found, exact = [torch.autograd.grad(function(x, *styles, 0.3, 0.2).sum(), x, create_graph=create_graph)
                    for function in (adain, adain.formula)]
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_and_rounded_right(kernels, dtype):
    """A row times d_norms / norms: all 65,536 times 1 come back; 1 times floats in and beside the middles are rounded."""
    def rows_times(rows, factors):
        return kernels.penalty_backward(rows, torch.ones(len(rows)), torch.zeros(()), factors)

    every = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype)
    for width in (1, 37, 40):  # alone and in vectors
        rows = every[:, None].repeat(1, width)
        torch.testing.assert_close(rows_times(rows, torch.ones(len(rows))), rows, rtol=0, atol=0, equal_nan=True)
        bits = torch.cat([every.float(), every.float().nextafter(torch.tensor(torch.inf))]).view(torch.int32).long()
        middles = torch.cat([bits + 2**(12 if dtype == torch.float16 else 15), *[bits + torch.randint(2**16, bits.shape)] * 2])
        floats = torch.cat([middles - 1, middles, middles + 1]).clamp(-2**31, 2**31 - 1).int().view(torch.float32)
        found = rows_times(torch.ones(len(floats), width, dtype=dtype), floats)
        torch.testing.assert_close(found, floats.to(dtype)[:, None].expand(-1, width), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [180, 181])
def test_a_tensor_no_cache_holds_is_written_past_the_caches(kernels, size):
    """On the CPU from 32 MB on, of whole lines: the same numbers as those of its halves, which are plainly written.

    A strength's gradient is summed up in smaller pieces there.
    """
    x, dy, noise = [torch.randn(2, channels, size, size) for channels in (131, 131, 1)]
    scale, bias, strength = torch.randn(2, 131), torch.randn(2, 131), torch.ones(1)
    assert x.nbytes > 2**25

    def both(part):
        inputs = [t[part].contiguous() for t in (x, scale, bias, noise)] + [strength]
        y, mean, rstd = kernels.adain(*inputs, 0.3, 0.2, 1e-5)
        dx, *sums, d_strength = kernels.adain_backward(dy[part].contiguous(), *inputs, mean, rstd, 0.3, 0.2)
        return [y, mean, rstd, dx, *sums], d_strength

    whole, halves = both(slice(0, 2)), [both(slice(i, i + 1)) for i in range(2)]
    assert all(torch.equal(a, torch.cat(parts)) for a, *parts in zip(whole[0], *[half[0] for half in halves]))
    torch.testing.assert_close(whole[1], torch.cat([half[1] for half in halves]), rtol=1e-4, atol=1e-2)
    for dtype in (torch.float32, torch.bfloat16, torch.float64) if x.device.type == "cpu" else (torch.float32,):
        rows = torch.cat([x, x]).to(dtype).view(4 * 131, -1)
        ones = torch.ones(len(rows), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(kernels.penalty_backward(rows, ones, ones.new_zeros(()), ones), rows)  # times 1


@pytest.mark.parametrize("mean, deviation", [(1000, 1), (-30, 1e-2), (3, 0)])
def test_large_means_lose_no_digits(mean, deviation):
    """E[x^2] - E[x]^2 in float32 would leave none of the first one's. A constant image gives the bias alone."""
    x = mean + deviation * torch.randn(2, 3, 64, 64)
    scale, bias = torch.ones(2, 3), torch.zeros(2, 3)
    exact = adain.formula(x.double(), scale.double(), bias.double())
    torch.testing.assert_close(adain(x, scale, bias).double(), exact, rtol=0, atol=2e-3)


def test_zero_norm_nan_and_nothing():
    gradient = torch.zeros(3, 4, requires_grad=True)
    penalty, norms = penalty_of(gradient)
    penalty.backward()
    assert penalty == 1 and not norms.any() and not gradient.grad.any()
    for shape in [(0, 4), (0, 0), (3, 0)]:
        found, exact = penalty_of(torch.zeros(shape)), penalty_of.formula(torch.zeros(shape))
        torch.testing.assert_close(found, exact, equal_nan=True)
    broken = torch.ones(3, 4)
    broken[1, 2] = torch.nan
    found = penalty_and_gradient(penalty_of, broken.requires_grad_())
    assert found[0].isnan() and found[1].isnan().tolist() == [False, True, False] and found[2][1].isnan().all()
    assert adain_and_gradients(adain, [tensor[:0] if tensor.dim() > 1 else tensor for tensor in
                                       adain_inputs((4, 4), torch.float32)], 1.0, 0.2)[0].shape == (0, 5, 4, 4)
    x = torch.randn(2, 3, 4, 4)
    x[1, 2, 3, 3] = torch.nan
    assert adain(x, torch.ones(2, 3), torch.zeros(2, 3)).isnan().flatten(2).all(2).sum() == 1
    x[1, 2, 3, 3] = torch.inf
    torch.testing.assert_close(adain(x, torch.ones(2, 3), torch.zeros(2, 3)),
                               adain.formula(x, torch.ones(2, 3), torch.zeros(2, 3)), equal_nan=True)
    strided = torch.randn(2, 1, 1, 16)[..., :8]  # one row: its stride says nothing
    x, one = torch.randn(2, 3, 1, 8), torch.ones(1)
    torch.testing.assert_close(adain(x, torch.ones(2, 3), torch.ones(2, 3), strided, one),
                               adain.formula(x, torch.ones(2, 3), torch.ones(2, 3), strided, one))


def test_what_the_kernels_do_not_take_goes_to_the_formula(kernels):
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        adain(torch.randn(2, 3, 1, 1), torch.ones(2, 3), torch.ones(2, 3))
    with Calls() as calls:
        tensors = adain_inputs((4, 4), torch.float32)
        noise = tensors[3].clone().requires_grad_()
        adain(*tensors[:3], noise, tensors[4]).square().sum().backward()
        assert noise.grad.any()
        adain(tensors[0], tensors[1][:1], tensors[2][:1])
        adain(*tensors[:3], torch.randn(3, 5, 4, 4), tensors[4])
        adain(*tensors[:3], None, tensors[4])
        with pytest.raises(RuntimeError):
            adain(tensors[0], tensors[1].T, tensors[2])
        penalty_of(torch.ones(3, 4, dtype=torch.complex64))
        assert not calls.count
        adain(*tensors), penalty_of(tensors[0])
        assert calls.count == {"adain": 1, "penalty": 1}


def test_inference_mode(kernels):
    """Within it the kernels serve; what it left behind can be kept by no graph but that of the formula."""
    x, scale, bias = adain_inputs((4, 4), torch.float32, noise="none")
    scale.requires_grad_()
    with Calls() as calls:
        with torch.inference_mode():
            left = x.clone()
            torch.testing.assert_close(adain(left, scale, bias), adain.formula(x, scale, bias))
            penalty_of(left)
        assert calls.count == {"adain": 1, "penalty": 1}
        assert torch.autograd.grad(adain(left, scale, bias).square().sum(), scale)[0].any()
        assert calls.count == {"adain": 1, "penalty": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_several_dtypes(dtype):
    """As under autocast: a convolution's and linear layers' results in 16 bits, noise and its strength in 32."""
    tensors = [t.to(dtype) if i < 3 else t for i, t in enumerate(adain_inputs((4, 6), torch.float32))]
    with Calls() as calls:
        found = adain_and_gradients(adain, tensors, 1.0, 0.2)
    assert calls.count == {"adain": 1, "adain_backward": 1}
    exact = adain_and_gradients(adain.formula, [tensor.double() for tensor in tensors], 1.0, 0.2)
    assert [t.dtype for t in found] == [torch.float32, *[dtype] * 3, torch.float32]
    assert difference(found[:1], exact[:1]) < 1e-5 and difference(found, exact) < 2 * TOLERANCE[dtype]
    assert [t.dtype for t in adain_and_gradients(adain.formula, tensors, 1.0, 0.2)] == [t.dtype for t in found]


def test_operators_refuse_another_device(kernels):
    x, noise, elsewhere = torch.ones(2, 3, 4, 4), torch.ones(2, 1, 4, 4), {"device": "meta"}
    for position, tensor in enumerate([x, torch.ones(2, 3), torch.ones(2, 3), noise, torch.ones(1)]):
        tensors = [x, torch.ones(2, 3), torch.ones(2, 3), noise, torch.ones(1)]
        tensors[position] = tensor.to("meta")
        with pytest.raises(RuntimeError, match="expected all tensors on"):
            kernels.adain(*tensors, 1.0, 1.0, 1e-5)
    with pytest.raises(RuntimeError, match="expected all tensors on"):
        kernels.penalty_backward(x, torch.ones(2), torch.ones((), **elsewhere), None)


@pytest.mark.parametrize("arguments, complaint", [
    ({"scale": torch.ones(2, 4)}, "scale"), ({"noise": torch.ones(2, 1, 4, 5)}, "noise"), ({"x": torch.ones(2, 3, 16)}, "x"),
    ({"x": torch.ones(2, 3, 0, 4), "noise": torch.ones(2, 1, 0, 4)}, "pixels"), ({"strength": torch.ones(2)}, "strength"), ({"strength": None}, "both or none"), ({"bias": torch.ones(2, 3).double()}, "bias"),
    ({"x": torch.ones(2, 3, 4, 4).transpose(2, 3)}, "x"), ({"noise": torch.ones(2, 1, 4, 4).half()}, "noise")])
def test_operators_refuse_what_would_be_read_out_of_bounds(kernels, arguments, complaint):
    good = dict(x=torch.ones(2, 3, 4, 4), scale=torch.ones(2, 3), bias=torch.ones(2, 3), noise=torch.ones(2, 1, 4, 4),
                strength=torch.ones(1), slope_before=1.0, slope_after=1.0, eps=1e-5)
    kernels.adain(**good)
    with pytest.raises(RuntimeError, match=complaint):
        kernels.adain(**(good | arguments))


def test_same_bits_on_every_run_and_any_number_of_threads():
    torch.manual_seed(0)
    gradient, tensors = torch.randn(3, 300_000, requires_grad=True), adain_inputs((40, 40), torch.float32)
    many = [torch.randn(256, 512, 2, 2), torch.ones(256, 512), torch.zeros(256, 512), torch.randn(256, 1, 2, 2), torch.ones(1)]

    def everything():
        return [*penalty_and_gradient(penalty_of, gradient), *adain_and_gradients(adain, tensors, 0.2, 0.2),
                *adain_and_gradients(adain, many, 1.0, 0.2)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(4)
        assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(one, everything()))
    finally:
        torch.set_num_threads(threads)


def test_first_and_second_derivatives():
    gradient = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(penalty_of, gradient) and torch.autograd.gradgradcheck(penalty_of, gradient)
    tensors = adain_inputs((3, 4), torch.float64, strength=5)
    inputs = [tensor.requires_grad_() for i, tensor in enumerate(tensors) if i != 3]

    def function(x, scale, bias, strength):
        return adain(x, scale, bias, tensors[3], strength, 0.3, 0.2)

    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile itself looks at it
@pytest.mark.parametrize("compiled", [False, True])
def test_a_penalty_through_fused_adain_is_no_silent_zero(compiled):
    """WGAN-GP through a critic that contains the op: its weights' gradients, which no check of the op alone sees.

    Compiled by a backend that has second derivatives: inductor refuses them.
    """
    torch.manual_seed(0)
    weights = [torch.randn(4, 2, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)]
    x = torch.randn(3, 2, 6, 6, requires_grad=True)

    def gradients(adain, penalty_of):
        hidden = torch.nn.functional.conv2d(x, weights[0])
        scale = hidden.mean((2, 3)) * weights[1]  # itself computed from the op's first argument
        score = adain(hidden, scale, scale * 0.5, slope_after=0.2).square().sum()
        slope, = torch.autograd.grad(score, x, create_graph=True)
        return torch.autograd.grad(penalty_of(slope)[0], weights)

    if compiled:
        found = gradients(*[torch.compile(function, backend="eager", fullgraph=True) for function in (adain, penalty_of)])
    else:
        with Calls() as calls:
            found = gradients(adain, penalty_of)
        assert calls.count == {"adain": 1, "penalty": 1, "penalty_backward": 1, "adain_backward": 1}  # the last for grad()
    torch.testing.assert_close(found, gradients(adain.formula, penalty_of.formula), rtol=1e-4, atol=1e-5)
    assert all(gradient.norm() > 1 for gradient in found)


def test_a_formula_of_later_is_no_silent_zero_either(device):
    """One that is decorated after the kernels were chosen: torch.compile takes it whole, with its second derivative."""
    @ops.fused("penalty")
    def late(gradient):
        norm = gradient.flatten(1).norm(2, dim=1)
        return (norm - 1).square().mean(), norm

    x = torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(late, backend="eager", fullgraph=True)
    slopes = [torch.autograd.grad(function(x)[0], x, create_graph=True)[0].square().sum() for function in (compiled, late.formula)]
    torch.testing.assert_close(*[torch.autograd.grad(slope, x) for slope in slopes])


def test_one_sample_whose_gradient_is_channels_last():
    """PyTorch's own derivative of the formula is wrong there: the graph for a second derivative must not begin with it."""
    x, scale, bias = torch.randn(1, 8, 6, 6, requires_grad=True), torch.randn(1, 8), torch.randn(1, 8)
    dy = torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    once, again = [torch.autograd.grad(adain(x, scale, bias), x, dy, create_graph=graph)[0] for graph in (False, True)]
    torch.testing.assert_close(once, again)


def test_arguments_by_name():
    gradient, (x, scale, bias, noise, strength) = torch.randn(5, 6), adain_inputs((4, 4), torch.float32)
    with Calls() as calls:
        torch.testing.assert_close(penalty_of(gradient=gradient), penalty_of.formula(gradient))
        found = adain(strength=strength, noise=noise, bias=bias, scale=scale, x=x)
    torch.testing.assert_close(found, adain.formula(x, scale, bias, noise, strength))
    assert calls.count == {"penalty": 1, "adain": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(kernels, dtype):
    real, x, noise = torch.ones(2, 3), torch.randn(2, 3, 4, 4).to(dtype), torch.randn(2, 1, 4, 4).to(dtype)
    gradient = torch.randn(3, 4).to(dtype)
    for operator, *arguments in [
            (kernels.penalty, gradient), (kernels.penalty_backward, gradient, torch.ones(3), torch.ones(()), None),
            (kernels.penalty_backward, gradient, torch.ones(3), torch.ones(()), torch.ones(3)),
            (kernels.adain, x, real, real, noise, torch.ones(1), 0.2, 1.0, 1e-5), (kernels.adain, x, real, real, None, None, 1.0, 1.0, 1e-5),
            (kernels.adain_backward, x, x, real, real, noise, torch.ones(3), real, real, 1.0, 0.2),
            (kernels.adain_backward, x, x, real, real, None, None, real, real, 1.0, 0.2)]:
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_takes_them_whole(device, dtype):
    """Forward and backward: no break in the graph, which has the operators in it, and the same results."""
    graphs = []

    def look(graph, example):
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    gradient, tensors = torch.randn(5, 6, dtype=dtype, requires_grad=True), adain_inputs((4, 4), dtype)
    for function, results, arguments in [(penalty_of, penalty_and_gradient, (gradient,)),
                                         (adain, adain_and_gradients, (tensors, 1.0, 0.2))]:
        whole = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=look))
        torch.testing.assert_close(results(whole, *arguments), results(function, *arguments))
    before, whole = len(graphs), torch.compile(penalty_of, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    for count in range(2, 12):  # more batches than torch.compile would compile one by one
        whole(torch.randn(count, 6, dtype=dtype))
    assert len(graphs) - before <= 2
    for operator in ("penalty", "penalty_backward", "adain", "adain_backward"):
        assert any(f"gan_{device}.{operator}.default" in code for code in graphs)


@pytest.mark.filterwarnings("ignore")  # inductor's
@pytest.mark.parametrize("size", ["block", pytest.param("generator", marks=pytest.mark.slow)])
def test_inductor_compiles_networks_of_varying_sizes(size, device, monkeypatch):
    """06's block, whose two noises lie in one tensor, at 4x4, 8x8 and 16x16; the generator for several batches."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    script = load_script("06_stylegan_blocks")
    if size == "block":
        network = script.StyleGANGeneratorBlock(3, 4, 6)
        inputs = [(torch.randn(2, 3, s, s), torch.randn(2, 6), torch.randn(1, 2, s, s)) for s in (4, 8, 16)]
    else:
        network = script.Generator(8, 32, 1, 32).eval()
        inputs = [(torch.randn(count, 8),) for count in (2, 3, 5)]
    compiled = torch.compile(network)
    for arguments in inputs:
        results = []
        for function in (compiled, network):
            torch.manual_seed(0)
            with torch.device("cpu"):  # as in the script, whose noise of fixed seed comes from there
                y = function(*arguments)
            gradients = torch.autograd.grad(y.square().sum(), list(network.parameters()), allow_unused=True)
            results.append([y.detach(), *[gradient for gradient in gradients if gradient is not None]])
        largest = max(result.abs().max().item() for result in results[1])  # a bias before the normalisation gets about 0
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5 * largest)


def test_more_elements_than_an_int32_counts(kernels):
    if common.free_memory() < 6 * 2**30:
        pytest.skip("needs 6 GiB of free memory")
    gradient = torch.zeros(2, 2**30 + 4, dtype=torch.bfloat16)  # float32 would take twice the memory
    gradient[0, -1], gradient[1, -1], gradient[1, 0] = 3, 4, 3  # norms 3 and 5
    penalty, norms = kernels.penalty(gradient)
    assert (penalty.item(), norms.tolist()) == (10, [3, 5])


@pytest.mark.parametrize("script, dtype, flags, operators", [
    pytest.param("03_wgan_gp", torch.float32, ["--lr-g", 1e-6, "--lr-d", 1e-6], {"penalty": 40, "penalty_backward": 40}, marks=pytest.mark.slow),
    ("03_wgan_gp", torch.float64, [], {"penalty": 40, "penalty_backward": 40}),
    pytest.param("06_stylegan_blocks", torch.float32, ["--lr-g", 3e-5, "--lr-d", 3e-5, "--batch-size", 8], {"adain": 32, "adain_backward": 16}, marks=pytest.mark.slow),
    ("06_stylegan_blocks", torch.float64, ["--progressive", "off", "--batch-size", 8, "--width", 32], {"adain": 128, "adain_backward": 64})])
def test_a_training_is_the_same_with_both(device, script, dtype, flags, operators, tmp_path, monkeypatch):
    """The first eight generator steps from one seed: every quantity of every step, and the fused operators' calls.

    At the scripts' own rates a training multiplies any rounding error, also that of PyTorch on another number of
    threads: there float64 is compared; in float32, which CUDA alone takes, a training at small rates.
    """
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("the kernels for CUDA do not take float64")

    def quantities(kernels):
        rows = []
        monkeypatch.setattr(common.Run, "record", lambda run, values: (rows.append([v.item() for v in values.values()]), record(run, values)))
        monkeypatch.setattr(common.Run, "_final_pictures", lambda run: None)
        with Calls() as calls, torch.device("cpu"):  # but for what goes to --device
            load_script(script).main([*map(str, flags), "--dataset", "digits", "--eval-interval", "0", "--kernels", kernels, "--device", device,
                                      "--output-dir", str(tmp_path), "--max-batches", "8", "--epochs", "1"])
        return torch.tensor([value for row in rows for value in row]), calls.count

    scaled, record = common.Data.scaled, common.Run.record
    monkeypatch.setattr(common.Data, "scaled", lambda data, index: scaled(data, index).to(dtype))
    common.draw_digits("train")  # kept from here on: float32, whatever follows
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        (fused, calls), (reference, none) = quantities("fused"), quantities("reference")
    finally:
        torch.set_default_dtype(default)
    assert not none and calls.keys() == {"penalty", *operators}  # penalty is tried out when the kernels are chosen
    assert all(calls[name] >= count for name, count in operators.items())  # pictures call adain, too
    assert len(fused) >= 8 * 5
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(fused, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_cuda_graph_capture():
    """A captured forward and backward pass, replayed with new numbers in its inputs."""
    tensors = [tensor.requires_grad_(i != 3) for i, tensor in enumerate(adain_inputs((16, 16), torch.float32))]

    def work():
        y = adain(*tensors, 0.2, 1.0)
        gradient, = torch.autograd.grad(y.square().sum(), tensors[0])
        return y, penalty_of(gradient)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = [result.detach() for result in work()]
    with torch.no_grad():
        tensors[0].normal_()
    graph.replay()
    torch.testing.assert_close(captured, list(work()), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_large_instances_beyond_an_int32():
    """2^31 and more elements of AdaIN, of which the last instance is looked at."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    x = torch.zeros(2, 2**14 + 1, 256, 256, dtype=torch.bfloat16)
    x[-1, -1, -1] = 1
    scale, bias = torch.ones(2, 2**14 + 1, dtype=torch.bfloat16), torch.zeros(2, 2**14 + 1, dtype=torch.bfloat16)
    y = adain(x, scale, bias)
    torch.testing.assert_close(y[-1, -1], adain.formula(x[-1:, -1:], scale[-1:, -1:], bias[-1:, -1:])[0, 0], rtol=2e-2, atol=1e-3)
    assert not y[:, :-1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    assert sanitizer, "compute-sanitizer comes with the CUDA toolkit"
    chosen = [f"{__file__}::test_penalty", f"{__file__}::test_adain", "-m", "gpu", "-k", "dtype1 or dtype2", "-q", "-p", "no:cacheprovider"]
    finished = subprocess.run([sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", *chosen],
                              capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})  # else it sees large blocks alone
    assert finished.returncode == 0, finished.stdout[-3000:]
