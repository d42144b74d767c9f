"""csrc/cuda.cu without a GPU: compiled as C++ for the emulator in tests/emulator, against PyTorch in float64."""

import ctypes
import itertools
import math
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import leaky_relu

CSRC, EMULATOR = Path(__file__).parent.parent / "csrc", Path(__file__).parent / "emulator"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ORDERS = range(6)
GREEDY = 4  # warp by warp: the order that alone finds most


def compiled(source, target, *options):
    options = ["-std=c++17", "-O1", "-w", f"-I{EMULATOR}", f"-I{CSRC}", *options, "-x", "c++", source, "-o", target]
    subprocess.run([os.environ.get("CXX", "c++"), *options], check=True)
    return target


def shared_library(source, target, *options):
    """Traps take the place of the GPU's error for a misaligned vector, and of memory beyond a shared array."""
    traps = ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
    return compiled(source, target, "-shared", "-fPIC", *traps, *options, EMULATOR / "calls.cpp")


def loaded(path):
    library = ctypes.CDLL(str(path))
    library.call_pieces.argtypes, library.call_pieces.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    return library


def turns(library, order=GREEDY, most_blocks=2**31 - 1):
    ctypes.c_int.in_dll(library, "emulator_order").value = order
    ctypes.c_uint.in_dll(library, "emulator_most_blocks").value = most_blocks


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    return loaded(shared_library(CSRC / "cuda.cu", tmp_path_factory.mktemp("emulated") / "cuda.so"))


@pytest.fixture
def library(built):
    turns(built)
    return built


def structure(name):
    """A struct of kernels.h."""
    text = re.sub("//.*", "", re.search(rf"struct {name} {{(.*?)\n}};", (CSRC / "kernels.h").read_text(), re.DOTALL)[1])
    kinds = {"int64_t": ctypes.c_int64, "double": ctypes.c_double, "void": ctypes.c_void_p}
    return type(name, (ctypes.Structure,), {"_fields_": [
        (field, kinds[kind]) for kind, fields in re.findall(r"(?:const )?(\w+)([^;]*);", text)
        for field in re.findall(r"\w+", fields)]})


Penalty, Adain = structure("Penalty"), structure("Adain")
LIBC = ctypes.CDLL(None)


class Memory:
    """Copies of tensors at multiples of 16 bytes, with NaN before and behind, then a page that cannot be touched."""

    def __init__(self):
        self.copies = []

    def __call__(self, values, shift=False):
        """shift: it begins one element earlier."""
        shift += -values.numel() % (16 // values.itemsize)
        pages = 2 + values.nbytes // mmap.PAGESIZE
        everything = torch.frombuffer(mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE), dtype=values.dtype,
                                      count=pages * mmap.PAGESIZE // values.itemsize).fill_(math.nan)
        assert LIBC.mprotect(ctypes.c_void_p(everything.data_ptr() + everything.nbytes), mmap.PAGESIZE, 0) == 0
        end = len(everything) - shift
        begin = end - values.numel()
        self.copies.append((everything, begin, end))
        return everything[begin:end].copy_(values.flatten()).view(values.shape)

    def empty(self, *shape, dtype=torch.float32, shift=False):
        return self(torch.full(shape, math.nan, dtype=dtype), shift)

    def check(self):
        for everything, begin, end in self.copies:
            assert everything[:begin].isnan().all() and everything[end:].isnan().all(), "written outside a tensor"


def call(library, name, kind, dtype, fields):
    fields = {key: value.data_ptr() if torch.is_tensor(value) else value for key, value in fields.items()}
    assert getattr(library, f"call_{name}")(ctypes.byref(kind(**fields)), DTYPES.index(dtype)) == 0


def penalty(library, u, v, d_penalty, d_norms, shift=()):
    """shift: names of the tensors that begin at no multiple of 16 bytes."""
    memory, dtype, (rows, columns) = Memory(), u.dtype, u.shape
    results = dict(penalty=memory.empty(), norms=memory.empty(rows),
                   d_v=memory.empty(rows, columns, dtype=dtype, shift="d_v" in shift))
    fields = dict(results, rows=rows, columns=columns, u=memory(u, "u" in shift), v=memory(v, "v" in shift),
                  d_penalty=memory(d_penalty), d_norms=None if d_norms is None else memory(d_norms),
                  partial=memory.empty(rows * library.call_pieces(rows, columns)))
    for name in ("penalty_forward", "penalty_backward"):
        call(library, name, Penalty, dtype, fields)
    memory.check()
    return results


def penalty_reference(u, v, d_penalty, d_norms):
    v = v.double().requires_grad_()
    norms = (u.double() * v).sum(1).clamp(min=0).sqrt()
    result = (norms - 1).square().mean()
    d_norms = torch.zeros_like(norms) if d_norms is None else d_norms.double()
    torch.autograd.backward([result, norms], [d_penalty.double(), d_norms])
    d_v = (2 * v.grad).where(norms[:, None] > 0, torch.zeros(()))  # 2: u = v W W^T changes with v
    return dict(penalty=result.detach(), norms=norms.detach(), d_v=d_v)


def adain(library, x, dy, scale, bias, noise, strength, slope, eps, gap=0, shift=()):
    """x, dy [N, C, pixels]; gap: elements between the noise of one sample and that of the next; shift: see penalty."""
    memory, dtype, (samples, channels, pixels) = Memory(), x.dtype, x.shape
    results = {name: memory.empty(*x.shape, dtype=dtype, shift=name in shift) for name in ("y", "dx")}
    results |= {name: memory.empty(samples, channels) for name in ("d_scale", "d_bias", "d_strength")}
    fields = dict(results, instances=samples * channels, channels=channels, pixels=pixels, eps=eps, slope=slope,
                  x=memory(x, "x" in shift), dy=memory(dy, "dy" in shift), scale=memory(scale),
                  bias=memory(bias), mean=memory.empty(samples, channels), rstd=memory.empty(samples, channels))
    if noise is None:
        fields["d_strength"] = None
        del results["d_strength"]
    else:
        rows = torch.cat([noise, torch.full_like(noise[:, :1], math.nan).expand(-1, gap)], dim=1).flatten()
        fields |= dict(noise=memory(rows[:len(rows) - gap], "noise" in shift), strength=memory(strength),
                       noise_stride=(pixels + gap) * (len(noise) > 1), strength_stride=int(len(strength) > 1))
    for name in ("adain_forward", "adain_backward"):
        call(library, name, Adain, dtype, fields)
    memory.check()
    return results


def adain_reference(x, dy, scale, bias, noise, strength, slope, eps, **_):
    x, scale, bias = (t.double().requires_grad_() for t in (x, scale, bias))
    inputs, z = dict(dx=x, d_scale=scale, d_bias=bias), x
    if noise is not None:  # one strength per instance, as the kernel's d_strength is not yet summed
        inputs["d_strength"] = strength.double().expand(len(x), x.size(1)).clone().requires_grad_()
        z = x + inputs["d_strength"][:, :, None] * noise.double()[:, None]
    variance, mean = torch.var_mean(z, dim=2, correction=0, keepdim=True)
    y = leaky_relu((z - mean) / (variance + eps).sqrt() * scale[:, :, None] + bias[:, :, None], slope)
    return dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy.double())), y=y.detach())


def close(found, expected, also=0.0):
    """Sums of up to 20,000 values partly cancel. 16 bits: the one rounding on top is by half an eps at most."""
    assert found.keys() == expected.keys()
    for name, result in found.items():
        allowed = also + (4e-6 if name in ("d_scale", "d_bias", "d_strength") else 1e-6)
        allowed += torch.finfo(result.dtype).eps / 2 if result.dtype != torch.float32 else 0
        assert result.shape == expected[name].shape
        error, norm = (result.double() - expected[name]).norm().item(), expected[name].norm().item()
        assert error <= allowed * norm, f"{name}: error {error / norm if norm else error:.2g}"


def penalty_inputs(rows, columns, dtype=torch.float32):
    random = torch.Generator().manual_seed(rows * columns)
    u = (torch.randn(rows, columns, generator=random) * 3 / columns**0.5).to(dtype)
    v = (u * torch.rand(rows, columns, generator=random)).to(dtype)  # u . v > 0
    return u, v, torch.randn((), generator=random), torch.randn(rows, generator=random)


def adain_inputs(pixels, dtype=torch.float32, noise="each", slope=1.0, mean=0.0, gap=0, shift=(),
                 channels=None):
    """noise: None, "shared" by the samples and of one strength, or for "each" sample, with a strength per channel."""
    random = torch.Generator().manual_seed(pixels)
    samples, channels = 2, channels or (5 if pixels < 2000 else 2)  # ten warps: a block of eight and a part of one

    def normal(*shape):
        return torch.randn(shape, generator=random)

    inputs = dict(x=normal(samples, channels, pixels) + mean, dy=normal(samples, channels, pixels),
                  scale=1 + normal(samples, channels) / 2, bias=normal(samples, channels), noise=None, strength=None)
    if noise:
        each = noise == "each"
        inputs |= dict(noise=normal(samples if each else 1, pixels), strength=normal(channels if each else 1))
    for name in ("x", "dy", "noise"):
        inputs[name] = None if inputs[name] is None else inputs[name].to(dtype)
    # eps: with two pixels and a small one dx nearly vanishes, and with it the norm that errors are compared with
    return dict(inputs, slope=slope, eps=1 / pixels, gap=gap, shift=shift)


def check_penalty(library, *sizes, **options):
    inputs = penalty_inputs(*sizes)
    close(penalty(library, *inputs, **options), penalty_reference(*inputs))


def check_adain(library, *arguments, also=0.0, **options):
    inputs = adain_inputs(*arguments, **options)
    close(adain(library, **inputs), adain_reference(**inputs), also)


# One piece a row: the first three. Several, of up to 1,024 elements: the next three; of more: (200, 8192); of more than
# a block takes at once: the next two, in vectors and one by one. A warp for each row: the last two.
SIZES = [(1, 1), (3, 7), (2, 784), (5, 3072), (3, 3073), (1, 49152), (200, 8192),
         pytest.param(1056, 8200, marks=pytest.mark.slow), (600, 2049), (1100, 8), (1057, 784)]
LIMITS = {16: 4, 32: 8, 64: 16, 128: 32, 256: 64, 1024: 256, 4096: 1024, 16384: 4096}  # pixels: float32 vectors
PIXELS = [2, 4, 16, 49, 64, 100, 256, 300, 784, 1024, 4096, 6000, 16384, 20000]
TENSORS = ["x", "dy", "noise", "y", "dx"]
OPTIONS = [dict(noise="each", gap=8, slope=0.2), dict(noise="each", gap=3, slope=0.6), dict(noise="shared"),
           dict(noise=None), dict(noise=None, slope=0.2), dict(shift=TENSORS), dict(channels=1),
           *[dict(gap=8, shift=[name]) for name in TENSORS]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", SIZES)
def test_penalty(library, rows, columns, dtype):
    for shift in [], ["u", "v", "d_v"]:
        check_penalty(library, rows, columns, dtype, shift=shift)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", PIXELS)
def test_adain(library, pixels, dtype):
    for options in OPTIONS:
        check_adain(library, pixels, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adain_just_above_what_a_layout_holds(library, dtype):
    for limit, more in itertools.product(LIMITS, (1, 16 // dtype.itemsize)):
        check_adain(library, limit + more, dtype, slope=0.6)


@pytest.mark.parametrize("pixels, channels, blocks, threads", [
    (16, 1, 1, 32), (16, 4 * 132, 132, 32), (16, 4 * 264, 132, 64), (16, 4 * 1320, 330, 128), (64, 132, 132, 32),
    (64, 264, 132, 64), (128, 131, 262, 32), (1024, 132, 132, 64), (2000, 3, 6, 256), (10000, 3, 6, 512)])
def test_few_instances_are_spread_over_all_multiprocessors(library, pixels, channels, blocks, threads):
    check_adain(library, pixels, channels=channels)
    launched = [ctypes.c_uint.in_dll(library, f"emulator_{name}").value for name in ("blocks", "threads")]
    assert launched == [blocks, threads]


def test_penalty_of_a_zero_row_and_without_a_gradient_of_the_norms(library):
    u, v, d_penalty, d_norms = penalty_inputs(4, 100)
    u[2] = v[2] = 0
    v[3] = -u[3] * 1e-30  # as rounding may leave it where the norm is 0
    for inputs in (u, v, d_penalty, d_norms), (u, v, d_penalty, None):
        found = penalty(library, *inputs)
        close(found, penalty_reference(*inputs))
        assert not found["norms"][2:].any() and not found["d_v"][2:].any()


def test_penalty_of_nothing(library):
    for rows, columns, expected in (0, 5, math.nan), (3, 0, 1.0), (0, 0, math.nan):
        found = penalty(library, *torch.zeros(2, rows, columns), torch.tensor(1.0), torch.ones(rows))
        assert found["penalty"].item() == pytest.approx(expected, nan_ok=True) and not found["norms"].any()


@pytest.mark.parametrize("pixels, mean", [*itertools.product([49, 64, 784, 4096, 16384, 20000], [30.0, 1e4])])
def test_adain_far_from_zero(library, pixels, mean):
    """No digits are lost but those of the mean in float32: mean / 2^24 of y, more of d_scale where d_bias is larger."""
    check_adain(library, pixels, noise=None, mean=mean, also=mean * 2**-22)


@pytest.mark.parametrize("function, inputs", [
    *[(penalty, penalty_inputs(*size)) for size in [(5, 3072), (3, 3073), (40, 784), (1057, 24)]],
    *[(adain, adain_inputs(pixels, slope=0.3).values())
      for pixels in (16, 49, 64, 300, 784, 4096, 6000, 16384, 20000)]])
def test_same_bits_in_any_order_and_grid(library, function, inputs):
    expected = function(library, *inputs)
    for order, most_blocks in itertools.product(ORDERS, (2**31 - 1, 1)):
        turns(library, order, most_blocks)
        found = function(library, *inputs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def check_briefly(library):
    """What every fault below fails: float32 only, as the faulty sources have no other."""
    for order in (0, 5, GREEDY):
        turns(library, order)
        check_adain(library, 4096, slope=0.3)
    for pixels in (16, 49, 100, 257, 784, 12000):
        test_adain(library, pixels, torch.float32)
    test_adain_just_above_what_a_layout_holds(library, torch.float32)
    test_adain_far_from_zero(library, 784, 1e3)
    for size in (5, 3072), (3, 3073), (600, 2049), (1057, 20):
        for shift in [], ["u"], ["v"], ["d_v"]:
            check_penalty(library, *size, shift=shift)
    test_penalty_of_a_zero_row_and_without_a_gradient_of_the_norms(library)
    turns(library, most_blocks=1)
    for size in (3, 3072), (1057, 20):
        check_penalty(library, *size)
    for pixels in (64, 4096):
        check_adain(library, pixels)
    test_few_instances_are_spread_over_all_multiprocessors(library, 16, 264, 66, 32)


FAULTS = {
    "no first barrier": ("__syncthreads();                                            // the sum before", "// "),
    "no second barrier": ("= value;\n    __syncthreads();", "= value;"),
    "a barrier for some": ("= value;\n    __syncthreads();", "= value, __syncthreads();"),
    "half a warp's mask": ("0xffffffffu, value, distance);\n  if", "0xffffu, value, distance);\n  if"),
    "sums of a whole warp for a part of it": ("distance = min(THREADS, 32) / 2", "distance = 16"),
    "sums of half the threads": ("distance = min(THREADS, 32) / 2", "distance = min(THREADS, 32) / 4"),
    "beyond shared memory": ("[threadIdx.x % (THREADS / 32)]", "[threadIdx.x % 32]"),
    "one vector too many": ("int(threadIdx.x); k < count)", "int(threadIdx.x); k <= count)"),
    "last tile too long": ("int(min(vectors - begin, int64_t(TILE)))", "TILE"),
    "steps between tiles": ("begin += TILE)", "begin += 2 * TILE)"),
    "no clamp": ("int(threadIdx.x), last)", "int(threadIdx.x), last + 31)"),
    "padding counted": ("<THREADS, ITEMS>(int(vectors), body);", "<THREADS, ITEMS>(TILE, body);"),
    "places of the first tile": ("body(j, begin + k)", "body(j, k)"),
    "noise of the first places": ("min((first + j) * THREADS", "min(j * THREADS"),
    "no centre": ("centre = sum<THREADS>(s)", "centre = 0 * sum<THREADS>(s)"),
    "centre taken for the mean": ("second - first * first", "second"),
    "d_strength without noise": ("d_strength += d_v * to_float(z[j].at[e])", "d_strength += d_v"),
    "slope not in the backward pass": ("bias > 0 ? 1 : slope); }", "bias > 0 ? 1 : 1); }"),
    "x for noise": ("a.strength_stride] : 0)", "a.strength_stride] : 1)"),
    "noise_stride ignored": ("i / a.channels * a.noise_stride", "i / a.channels * a.pixels"),
    "strength_stride ignored": ("[i % a.channels * a.strength_stride]", "[i % a.channels]"),
    "pixels not divisible": ("a.pixels % V == 0 && ", ""),
    "noise_stride not aligned": ("(a.noise_stride * sizeof(T)) % 16 == 0 && ", ""),
    "too few blocks": ("(a.instances + per_block - 1) / per", "a.instances / per"),
    "few blocks of many warps": ("/ MULTIPROCESSORS, 1, 4)", ", 1, 4)"),
    "instances of four warps": ("int64_t(blockIdx.x) * blockDim.y", "int64_t(blockIdx.x) * 4"),
    "steps between instances": ("step = int64_t(gridDim.x) *", "step = 2 * int64_t(gridDim.x) *"),
    "threads without an instance": ("min(first + threadIdx.y, a.instances - 1)", "first + threadIdx.y"),
    "columns not divisible": ("p.columns % V != 0 || ", ""),
    "u not aligned": ("{p.u, p.v, p.d_v}", "{p.v, p.d_v}"),
    "v not aligned": ("{p.u, p.v, p.d_v}", "{p.u, p.d_v}"),
    "d_v not aligned": ("{p.u, p.v, p.d_v}", "{p.u, p.v}"),
    "pieces overlap": ("min(cut.length, cut.vectors - j * cut.length)", "cut.length"),
    "steps between pieces": ("j += gridDim.x", "j += 2 * gridDim.x"),
    "steps between rows": ("row += step", "row += 2 * step"),
    "one row of eight": ("blockDim.y + threadIdx.y; row", "blockDim.y; row"),
    "squares of the first tile": ("total = 0;\n    each_tile<THREADS * ROW_ITEMS<THREADS>>(count, ",
                                  "total = 0;\n    each_tile<1 << 30>(count, "),
    "stores into the first tile": ("d_v[tile + k]", "d_v[k]"),
    "other rows' pieces": ("distance = lanes / 2", "distance = 16"),
    "pieces left out": ("j += lanes", "j += 32"),
    "rows left out": ("first += 1024 / lanes", "first += 1024"),
    "rows counted by each lane": ("row < p.rows && lane == 0", "row < p.rows"),
    "rows beyond the last": ("    if (row < p.rows)\n", ""),
    "division by a zero norm": ("norm == 0 ? 0 : ", ""),
    "the root of less than zero": ("square < 0 ? 0 : ", ""),
}
FAULTS |= {f"{name} not aligned": ("{a.x, a.noise, a.y, a.dy, a.dx}", "{" + ", ".join(
    f"a.{other}" for other in ("x", "noise", "y", "dy", "dx") if other != name) + "}") for name in TENSORS}
FAULTS |= {f"{limit} pixels are no limit": (
    "a.pixels > L::ROOM", f"a.pixels > L::ROOM + (L::ROOM == {limit} && L::TILE == {tile} ? 4 : 0)")
    for limit, tile in LIMITS.items()}
FAULTS["256 pixels one by one are no limit"] = "a.pixels > L::ROOM", "a.pixels > L::ROOM + (L::TILE == L::ROOM)"
OFTEN = ["no second barrier", "last tile too long", "noise not aligned"]


@pytest.mark.parametrize("fault", [pytest.param(fault, marks=[pytest.mark.slow] * (fault not in OFTEN))
                                   for fault in ("none", *FAULTS)])
def test_faults_are_found(fault, tmp_path):
    """By check_briefly, in a process of its own, which the faulty library may crash."""
    source = (CSRC / "cuda.cu").read_text()
    snippet, faulty = FAULTS.get(fault, ("", ""))
    assert fault == "none" or source.count(snippet) == 1
    source, others = re.subn(r"    case Dtype::b?float16:.*\n", "", source.replace(snippet, faulty))  # for speed
    assert others == 2
    (tmp_path / "cuda.cu").write_text(source)
    path = shared_library(tmp_path / "cuda.cu", tmp_path / "cuda.so", "-O0")
    result = subprocess.run([sys.executable, __file__, path], stderr=subprocess.PIPE, text=True, check=False)
    if fault == "none":
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode < 0 or "AssertionError" in result.stderr, "not found"


def test_emulator_shows_mistakes(tmp_path):
    """It runs threads in any order, stops with one line, and reads NaN from exited lanes and unwritten memory."""
    program = compiled(EMULATOR / "mistakes.cu", tmp_path / "mistakes")

    def run(name):
        return [subprocess.run([program, name, str(order)], capture_output=True, text=True, check=False)
                for order in ORDERS]

    def numbers(name):
        return [list(map(float, result.stdout.split())) for result in run(name)]

    for name, message in [
            ("two_barriers", r"divergent barriers in lines \d+ and \d+"), ("barrier_and_shuffle", "deadlock"),
            ("wrong_mask", "a shuffle whose mask leaves its caller out"), ("large_frame", "stack overflow"),
            ("no_blocks", "invalid launch of 0,1,1 blocks"), ("no_threads", "invalid launch"),
            ("many_threads", "invalid launch")]:
        assert all(result.returncode < 0 and re.fullmatch(rf"emulator: {message}.*\n", result.stderr)
                   for result in run(name)), name
    for name in "missing_barrier", "missing_second_barrier":
        assert len({result.stdout for result in run(name)}) > 1
    for none, lanes, unwritten in zip(numbers("none"), numbers("exited_lanes"), numbers("unwritten_shared")):
        assert none == pytest.approx([63 - i + (i % 32 ^ 1) / 100 for i in range(64)])
        assert [i for i in range(24) if math.isnan(lanes[i])] == list(range(8, 16)) and lanes[:2] == [16, 17]
        assert unwritten and all(map(math.isnan, unwritten))


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_briefly(loaded(sys.argv[1]))
