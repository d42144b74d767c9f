"""The fused kernels in PyTorch, against the scripts' formulas in float64: on the CPU, with -m gpu on a GPU."""

import collections
import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import common
from conftest import load_script
from csrc import ops

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of the norm
adain = load_script("06_stylegan_blocks").adain


def penalty_of(v, weight):
    """The operation with which gradient_penalty ends: of the rows of v weight, mean((norm - 1)^2) and the norms."""
    return [t.to(v.dtype) for t in ops.Penalty.apply(v, weight, ops.KERNELS[v.device.type])]


def formula_of_penalty(v, weight):
    norms = (v @ weight).norm(2, dim=1)
    return (norms - 1).square().mean(), norms


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def kernels(device):
    """The operators. Where there are none that is a failure: all tests below would compare PyTorch with itself."""
    ops.choose("fused", device)
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


def penalty_and_gradients(function, v, weight, **options):
    """By both results, so that norms are differentiated, too."""
    inputs = v.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    penalty, norms = function(*inputs)
    factors = torch.arange(1, len(norms) + 1).to(norms) / max(1, len(norms))
    return [penalty, norms, *torch.autograd.grad(1.75 * penalty + (factors * norms).sum(), inputs, **options)]


def adain_inputs(size, dtype=torch.float32, noise="own", strength=1, layout=torch.Tensor.contiguous):
    """x, scale, bias and, unless it is "none", the noise, "own" or "shared" by all samples, and its strength."""
    x = layout((torch.randn(3, 5, *size) + 0.5).to(dtype))
    tensors = [1 + 0.3 * torch.randn(3, 5), torch.randn(3, 5)]
    if noise != "none":
        noise = torch.randn(1 if noise == "shared" else 3, 2, *size)[:, 1:]  # strided, as 06 cuts it
        tensors += [noise, torch.randn(strength)]
    return [x, *[tensor.to(dtype) for tensor in tensors]]


def adain_and_gradients(function, tensors, slope):
    inputs = [tensor if i == 3 else tensor.detach().clone().requires_grad_() for i, tensor in enumerate(tensors)]
    noise = inputs[3:] if len(inputs) > 3 else [None, None]
    y = function(*inputs[:3], *noise, slope)
    dy = torch.arange(y.numel()).mul(37).sin().view_as(y).bfloat16()  # the same in every dtype
    return [y, *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy.to(y))]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("samples, units, inputs", [
    (1, 1, 5), (5, 1, 1), (300, 128, 784), (64, 128, 784), (40, 3, 100_003), (600, 2049, 7), (2, 100_003, 3),
    (1500, 9, 4), (1057, 784, 2), (3, 2**17, 2), (1060, 8300, 3)])
def test_penalty(samples, units, inputs, dtype):
    """With more samples than units and with fewer; rows of one piece and of several."""
    torch.manual_seed(0)
    scale = 1.4 / (units * inputs)**0.25
    given = [(scale * torch.randn(size)).to(dtype) for size in [(samples, units), (units, inputs)]]
    found = penalty_and_gradients(penalty_of, *given)
    exact = penalty_and_gradients(formula_of_penalty, *[tensor.double().cpu() for tensor in given])
    assert difference(found, exact) < 10 * TOLERANCE[dtype] and all(value.dtype == dtype for value in found)


def test_a_product_below_zero_is_a_norm_of_zero(kernels):
    """By rounding u . v may be less than the 0 that it should be."""
    u, v = torch.ones(3, 4), torch.tensor([[1.0], [-1e-9], [torch.nan]]).expand(3, 4).contiguous()
    penalty, norms = kernels.penalty(u, v)
    assert norms[:2].tolist() == [2, 0] and norms[2].isnan() and penalty.isnan()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("noise, strength, slope", [
    ("none", 0, 0.2), ("none", 0, 1.0), ("own", 1, 0.2), ("own", 5, 0.1),
    ("shared", 5, 1.0)])
@pytest.mark.parametrize("size", [(1, 2), (4, 4), (7, 7), (8, 8), (16, 16), (33, 31), (99, 131)])
def test_adain(size, noise, strength, slope, dtype):
    torch.manual_seed(0)
    tensors = adain_inputs(size, dtype, noise, strength)
    found = adain_and_gradients(adain, tensors, slope)
    exact = adain_and_gradients(adain.formula, [tensor.double().cpu() for tensor in tensors], slope)
    if size == (1, 2):  # two pixels normalise to +-1 whatever they are: the derivative is next to nothing
        found, exact = [[*values[:1], *values[2:4]] for values in (found, exact)]
    assert difference(found, exact) < 5 * TOLERANCE[dtype], [difference([a], [b]) for a, b in zip(found, exact)]
    assert all(value.dtype == dtype for value in found)


@pytest.mark.parametrize("layout", [
    lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    lambda x: torch.cat([x, x], 3)[..., :x.size(3)], lambda x: torch.cat([x[:1] * 0, x])[1:]])
def test_any_layout(layout):
    tensors = adain_inputs((6, 10), layout=layout)
    assert not tensors[0].is_contiguous() or tensors[0].storage_offset()
    exact = adain_and_gradients(adain.formula, [tensor.double() for tensor in tensors], 0.2)
    assert difference(adain_and_gradients(adain, tensors, 0.2), exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_and_rounded_right(kernels, dtype):
    """A row times d_norms / norms: all 65,536 times 1 come back; 1 times floats beside the middles are rounded."""
    def rows_times(rows, factors):
        return kernels.penalty_backward(rows, torch.ones(len(rows)), torch.zeros(()), factors)

    every = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype)
    bits = torch.cat([every.float(), every.float().nextafter(torch.tensor(torch.inf))]).view(torch.int32).long()
    middles = torch.cat([bits + 2**(12 if dtype == torch.float16 else 15), bits + torch.randint(2**16, bits.shape)])
    floats = torch.cat([middles - 1, middles, middles + 1]).clamp(-2**31, 2**31 - 1).int().view(torch.float32)
    for width in (1, 37, 40):  # alone and in vectors
        rows = every[:, None].repeat(1, width)
        torch.testing.assert_close(rows_times(rows, torch.ones(len(rows))), rows, rtol=0, atol=0, equal_nan=True)
        found = rows_times(torch.ones(len(floats), width, dtype=dtype), floats)
        torch.testing.assert_close(found, floats.to(dtype)[:, None].expand(-1, width), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [180, 181])
def test_a_tensor_no_cache_holds_is_written_past_the_caches(kernels, size):
    """On the CPU from 32 MB on, of whole lines: the same numbers as those of its halves, which are plainly written."""
    x, dy, noise = [torch.randn(2, channels, size, size) for channels in (131, 131, 1)]
    scale, bias, strength = torch.randn(2, 131), torch.randn(2, 131), torch.ones(1)
    assert x.nbytes > 2**25

    def both(part):
        inputs = [t[part].contiguous() for t in (x, scale, bias, noise)] + [strength]
        y, mean, rstd = kernels.adain(*inputs, 0.2, 1e-5)
        dx, *sums, d_strength = kernels.adain_backward(dy[part].contiguous(), *inputs, mean, rstd, 0.2)
        return [y, mean, rstd, dx, *sums], d_strength

    whole, halves = both(slice(0, 2)), [both(slice(i, i + 1)) for i in range(2)]
    assert all(torch.equal(a, torch.cat(parts)) for a, *parts in zip(whole[0], *[half[0] for half in halves]))
    torch.testing.assert_close(whole[1], torch.cat([half[1] for half in halves]), rtol=1e-4, atol=1e-2)  # other pieces
    rows, ones = torch.cat([x, x]).view(4 * 131, -1), torch.ones(4 * 131)
    assert torch.equal(kernels.penalty_backward(rows, ones, torch.zeros(()), ones), rows)  # times 1


@pytest.mark.parametrize("mean, deviation", [(1000, 1), (-30, 1e-2), (3, 0)])
def test_large_means_lose_no_digits(mean, deviation):
    """E[x^2] - E[x]^2 in float32 would leave none of the first one's. A constant image gives the bias alone."""
    x = mean + deviation * torch.randn(2, 3, 64, 64)
    scale, bias = torch.ones(2, 3), torch.zeros(2, 3)
    exact = adain.formula(x.double(), scale.double(), bias.double())
    torch.testing.assert_close(adain(x, scale, bias).double(), exact, rtol=0, atol=2e-3)


def test_penalty_of_zero_nothing_and_nan(kernels):
    penalty, norms, d_v, d_weight = penalty_and_gradients(penalty_of, torch.zeros(3, 4), torch.eye(4))
    assert penalty == 1 and not norms.any() and not d_v.any() and not d_weight.any()
    for nothing in torch.zeros(0, 4), torch.zeros(0, 0), torch.zeros(3, 0):
        exact = formula_of_penalty(nothing, torch.zeros(nothing.size(1), 1))
        torch.testing.assert_close(kernels.penalty(nothing, nothing), exact, equal_nan=True)
    broken = torch.ones(3, 4)
    broken[1, 2] = torch.nan
    penalty, norms, d_v, _ = penalty_and_gradients(penalty_of, broken, torch.eye(4))
    assert penalty.isnan() and norms.isnan().tolist() == [False, True, False] and d_v[1].isnan().all()


def test_adain_of_nothing_nan_and_one_row():
    x, scale, bias, *_ = adain_inputs((4, 4))
    assert adain_and_gradients(adain, [x[:0], scale[:0], bias[:0]], 0.2)[0].shape == (0, 5, 4, 4)
    for value in (torch.nan, torch.inf):
        x[1, 2, 3, 3] = value
        found = adain(x, scale, bias)
        assert found.isnan().flatten(2).any(2).sum() == 1
        torch.testing.assert_close(found, adain.formula(x, scale, bias), equal_nan=True)
    x, strided = torch.randn(3, 5, 1, 8), torch.randn(3, 1, 1, 16)[..., :8]  # one row: its stride says nothing
    torch.testing.assert_close(adain(x, scale, bias, strided, torch.ones(1)),
                               adain.formula(x, scale, bias, strided, torch.ones(1)))


def test_same_bits_on_every_run_and_any_number_of_threads(kernels):
    torch.manual_seed(0)
    gradient, tensors = torch.randn(3, 300_000), adain_inputs((40, 40))
    many = [torch.randn(size) for size in [(256, 512, 2, 2), (256, 512), (256, 512), (256, 1, 2, 2), (1,)]]

    def everything():
        penalty, norms = kernels.penalty(gradient, gradient)
        d_gradient = kernels.penalty_backward(gradient, norms, penalty, norms)
        return [penalty, norms, d_gradient, *adain_and_gradients(adain, tensors, 0.2),
                *adain_and_gradients(adain, many, 0.2)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(4)
        assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(one, everything()))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("create_graph", [False, True])
def test_expanded_gradients(create_graph):
    """That of a sum is one number, expanded; under create_graph another piece of code computes it."""
    x, *styles = adain_inputs((6, 10))
    v, weight = x.flatten(1).requires_grad_(), torch.randn(300, 7)
    for sums in [[f(v, weight)[1].sum() for f in (penalty_of, formula_of_penalty)],
                 [f(v.view_as(x), *styles, 0.2).sum() for f in (adain, adain.formula)]]:
        found, exact = [torch.autograd.grad(value, v, create_graph=create_graph) for value in sums]
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_first_and_second_derivatives(device):
    if device == "cuda":
        pytest.skip("float64 is for the CPU")
    v, weight = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in [(4, 3), (3, 5)])
    assert torch.autograd.gradcheck(lambda *given: tuple(penalty_of(*given)), (v, weight))
    tensors = adain_inputs((3, 4), torch.float64, strength=5)
    inputs = [tensor.requires_grad_() for i, tensor in enumerate(tensors) if i != 3]

    def function(x, scale, bias, strength):
        return adain(x, scale, bias, tensors[3], strength, 0.2)

    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile itself looks at it
@pytest.mark.parametrize("compiled", [False, True])
def test_a_penalty_through_fused_adain_is_no_silent_zero(compiled, device, monkeypatch):
    """WGAN-GP through a critic that contains the op: its weights' gradients, which no check of the op alone sees.

    torch.compile takes the formulas, whatever kernels there are.
    """
    torch.manual_seed(0)
    weights = [torch.randn(4, 2, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)]
    x = torch.randn(3, 2, 6, 6, requires_grad=True)

    def gradients(adain, penalty_of):
        hidden = torch.nn.functional.conv2d(x, weights[0])
        scale = hidden.mean((2, 3)) * weights[1]  # itself computed from the op's first argument
        score = adain(hidden, scale, scale * 0.5, slope=0.2).square().sum()
        slope, = torch.autograd.grad(score, x, create_graph=True)
        return torch.autograd.grad(penalty_of(slope.flatten(1), torch.eye(72))[0], weights)

    if compiled:
        monkeypatch.setitem(ops.KERNELS, device, "none that could be called")
        found = gradients(torch.compile(adain, backend="eager", fullgraph=True), formula_of_penalty)
    else:
        with Calls() as calls:
            found = gradients(adain, penalty_of)
        assert calls.count == {"adain": 1, "penalty": 1, "penalty_backward": 2, "adain_backward": 1}
    torch.testing.assert_close(found, gradients(adain.formula, formula_of_penalty), rtol=1e-4, atol=1e-5)
    assert all(gradient.norm() > 1 for gradient in found)


def test_one_sample_whose_gradient_is_channels_last():
    """PyTorch's own derivative of the formula is wrong there: a graph for a second one must not begin with it."""
    x, scale, bias = torch.randn(1, 8, 6, 6, requires_grad=True), torch.randn(1, 8), torch.randn(1, 8)
    dy = torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    once, again = [torch.autograd.grad(adain(x, scale, bias), x, dy, create_graph=graph)[0] for graph in (False, True)]
    torch.testing.assert_close(once, again)


def test_what_the_kernels_do_not_take_goes_to_the_formula(kernels):
    x, scale, bias, noise, strength = tensors = adain_inputs((4, 4))
    with torch.inference_mode():
        inferred = x.clone()  # can be kept by no graph but that of the formula
    with Calls() as calls:
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            adain(torch.randn(2, 3, 1, 1), torch.ones(2, 3), torch.ones(2, 3))
        with pytest.raises(RuntimeError):
            adain(x, scale.T, bias)
        trained = noise.clone().requires_grad_()
        adain(x, scale, bias, trained, strength).square().sum().backward()
        adain(inferred, scale.requires_grad_(), bias).square().sum().backward()
        assert trained.grad.any() and scale.grad.any()
        adain(x, scale[:1], bias[:1])
        adain(x, scale, bias, torch.randn(3, 5, 4, 4), strength)
        adain(x, scale, bias, None, strength)
        assert not calls.count
        by_name = adain(strength=strength, noise=noise, bias=bias, scale=scale, x=x)
        torch.testing.assert_close(by_name, adain(*tensors), rtol=0, atol=0)
        assert calls.count == {"adain": 2}
    with pytest.raises(RuntimeError, match="scale"):  # by itself an operator reads nothing out of bounds
        kernels.adain(x, scale[:, :4], bias, None, None, 1.0, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_several_dtypes(dtype):
    """As under autocast: a convolution's and linear layers' results in 16 bits, noise and its strength in 32."""
    tensors = [t.to(dtype) if i < 3 else t for i, t in enumerate(adain_inputs((4, 6)))]
    with Calls() as calls:
        found = adain_and_gradients(adain, tensors, 0.2)
    assert calls.count == {"adain": 1, "adain_backward": 1}
    exact = adain_and_gradients(adain.formula, [tensor.double() for tensor in tensors], 0.2)
    assert [t.dtype for t in found] == [torch.float32, *[dtype] * 3, torch.float32]
    assert difference(found[:1], exact[:1]) < 1e-5 and difference(found, exact) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("script, flags, operators", [
    ("03_wgan_gp", [], {"penalty": 20, "penalty_backward": 20}),
    ("06_stylegan_blocks", ["--progressive", "off", "--batch-size", "8", "--width", "32"],
     {"adain": 64, "adain_backward": 32})])
def test_a_training_is_the_same_with_both(script, flags, operators, tmp_path, monkeypatch):
    """The log of four generator steps from one seed, each an epoch; and the fused operators' calls.

    In float64: a training multiplies any rounding error, also that of PyTorch on another number of threads.
    """
    scaled, default = common.Data.scaled, torch.get_default_dtype()
    monkeypatch.setattr(common.Data, "scaled", lambda data, index: scaled(data, index).double())
    monkeypatch.setattr(common.Run, "_final_pictures", lambda run: None)  # they take longer than the training
    monkeypatch.setattr(common, "save_curves", lambda *_: None)
    common.draw_digits("train")  # kept from here on: float32, whatever follows

    def quantities(kernels):
        with Calls() as calls:
            load_script(script).main([*flags, "--dataset", "digits", "--eval-interval", "0", "--kernels", kernels,
                                      "--device", "cpu", "--output-dir", str(tmp_path / kernels), "--max-batches", "1",
                                      "--epochs", "4", "--sample-interval", "9"])
        log, = (tmp_path / kernels).glob("*/log.jsonl")
        return [{**json.loads(line), "seconds": 0} for line in log.read_text().splitlines()], calls.count

    try:
        torch.set_default_dtype(torch.float64)
        (fused, calls), (reference, none) = map(quantities, ("fused", "reference"))
    finally:
        torch.set_default_dtype(default)
    assert not none and calls.keys() == {"penalty", *operators}  # penalty is tried out when the kernels are chosen
    assert all(calls[name] >= count for name, count in operators.items())  # pictures call adain, too
    assert len(fused) == 4 and fused == [pytest.approx(row, rel=1e-9, abs=1e-9) for row in reference]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    assert sanitizer, "compute-sanitizer comes with the CUDA toolkit"
    chosen = [f"{__file__}::test_penalty", f"{__file__}::test_adain", "-m", "gpu", "-k", "dtype1 or dtype2", "-q"]
    finished = subprocess.run([sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest",
                               *chosen], capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})  # else it sees large blocks
    assert finished.returncode == 0, finished.stdout[-3000:]
