"""--compare-kernels: are the fused kernels right, and what do they gain? A table per shape, then the training step."""

import contextlib
import ctypes
import math
import platform
import statistics
import time
from pathlib import Path

import torch

from csrc import ops

ROUNDS = 9  # interleaved, so that a busy neighbour slows all alike
TOLERANCE = 1e-4  # of float32 results against float64; d_strength sums up what nearly cancels
SHAPES = {"penalty": [(64, 784), (300, 784), (4096, 784), (512, 3072), (64, 49152)],
          "adain": [(32, 64, 4, 4), (32, 64, 8, 8), (32, 32, 16, 16), (32, 16, 32, 32),  # 06's own
                    (16, 512, 4, 4), (16, 256, 32, 32), (16, 128, 64, 64)]}
LARGE = {"penalty": (64, 49152), "adain": (16, 64, 128, 128)}  # of samples that four last caches would not hold
GRAPH = 20  # calls in a CUDA graph: what it takes to launch one does not count
PASSES = {"penalty": (1, 3), "adain": (2, 5)}  # over the tensor: forward, forward and backward


def compare(formula, step, device, free, table):
    """Check and time the kernel that serves `formula` against the formula itself and torch.compile.

    formula: a function under @fused; step: one training step, timed with the kernels and without; free: bytes of main
    memory. Yields the lines to print; completes the dictionary `table`, which becomes a file.
    """
    kind = formula.kernel
    table |= {"kernel": kind, "machine": machine(device), "threads": torch.get_num_threads(),
              "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "dtype": "float32", "rows": []}
    yield (f"compare {kind} on {table['machine']}, {table['threads']} threads, torch {torch.__version__}, float32; "
           f"medians of {ROUNDS} rounds, +- half the interquartile range" +
           "; shapes as CUDA graphs" * (device == "cuda"))

    def without():
        with ops.without_kernels():
            step()

    table["training_step"] = steps = measure({"reference": without, "fused": step}, device)
    keep_freed_memory()
    large = beyond_the_cache(LARGE[kind], device, free)
    if large is None:
        yield "compare no shape beyond the last cache: too little memory is free for a tensor four times as large"
    yield (f"{'shape':22}{'pass':18}{'reference':>19}{'fused':>19}{'torch.compile':>19}   "
           "  MB   GB/s  of copy  gain   error: reference, fused, compile")
    for shape in [*SHAPES[kind], *[large] * bool(large)]:
        rows = compare_shape(formula, shape, device)
        table["rows"] += rows
        yield "\n".join(map(line, rows))
    gain = steps["reference"]["median"] / steps["fused"]["median"]
    yield f"step    reference {show(steps['reference'])}, fused {show(steps['fused'])}: {gain:.2f} times as fast"


def compare_shape(formula, shape, device):
    """The two rows, forward and both passes, of one shape."""
    kind = formula.kernel
    torch._dynamo.reset()  # else it would try to compile one function for all shapes
    compiled = torch.compile(formula.formula, dynamic=False)
    functions = {"reference": formula.formula, "fused": formula, "torch.compile": compiled}
    samples = max(1, min(shape[0], 2**23 * shape[0] // torch.Size(shape).numel()))  # float64 takes room
    exact = results(kind, formula.formula, inputs(kind, (samples, *shape[1:]), device, torch.float64))
    errors = {}
    for name, function in functions.items():
        try:
            found = results(kind, function, inputs(kind, (samples, *shape[1:]), device, torch.float32))
            worst = torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, exact)]).max().item()  # NaN if one is
            errors[name] = worst if math.isfinite(worst) else str(worst)
        except Exception as reason:  # torch.compile needs more than the others; the row shows it
            if name == "reference":
                raise
            errors[name] = f"{type(reason).__name__}: {reason}".splitlines()[0][:80]
    sound = {name: function for name, function in functions.items()
             if isinstance(errors[name], float) and errors[name] <= TOLERANCE}
    tensors = inputs(kind, shape, device, torch.float32)
    copy = torch.empty_like(tensors[0])
    tasks = {("both passes", name): lambda f=f: results(kind, f, tensors) for name, f in sound.items()}
    tasks |= {("forward", name): lambda f=f: forward(kind, f, tensors) for name, f in sound.items()}
    tasks["copy"] = lambda: copy.copy_(tensors[0].detach())
    calls = GRAPH if device == "cuda" else 1
    times = measure({name: launched_at_once(task, device) for name, task in tasks.items()}, device, calls)
    rows = []
    for label, passes in zip(["forward", "both passes"], PASSES[kind]):
        row = {"shape": shape, "pass": label, "bytes": passes * copy.nbytes, "errors": errors,
               "checked_samples": samples, "seconds": {name: times[label, name] for name in sound}}
        if "fused" in sound:
            row["bandwidth"] = row["bytes"] / row["seconds"]["fused"]["median"]
            row["share_of_copy"] = row["bandwidth"] / (2 * copy.nbytes / times["copy"]["median"])
        rows.append(row)
    return rows


def line(row):
    """A row as it is printed."""
    seconds = row["seconds"]
    cells = [show(seconds[name]) if name in seconds else "not timed" for name in row["errors"]]
    errors = ", ".join(f"{e:.0e}" if isinstance(e, float) else e for e in row["errors"].values())
    rate, share = row.get("bandwidth", math.nan) / 1e9, row.get("share_of_copy", math.nan)
    gain = math.nan
    if "reference" in seconds and "fused" in seconds:
        gain = seconds["reference"]["median"] / seconds["fused"]["median"]
    return (f"{'x'.join(map(str, row['shape'])):22}{row['pass']:18}" + "".join(f"{cell:>19}" for cell in cells) +
            f" {digits(row['bytes'] / 1e6, 3):>6} {rate:6.1f} {share:8.2f} {gain:5.2f}   {errors}")


def inputs(kind, shape, device, dtype):
    """The tensors of one case, the same numbers in every dtype; those that get a gradient require one."""
    rng = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=rng).to(device, dtype)

    if kind == "penalty":
        length = torch.Size(shape[1:]).numel()**0.5
        return [normal(*shape).mul_(1.5 / length).requires_grad_()]  # norms about 1.5: (norm - 1)^2 keeps its digits
    x, scale, bias, strength = normal(*shape), normal(*shape[:2]), normal(*shape[:2]), normal(1)
    trained = [tensor.requires_grad_() for tensor in (x, scale, bias, strength)]
    return [*trained[:3], normal(shape[0], 1, *shape[2:]), trained[3]]


def forward(kind, function, tensors):
    """As the scripts call it."""
    return function(*tensors)[0] if kind == "penalty" else function(*tensors, slope_after=0.2)


def results(kind, function, tensors):
    """The value and every gradient, of the penalty or of the sum of AdaIN's squares halved: dy = y."""
    value = forward(kind, function, tensors)
    gradient = None if kind == "penalty" else value.detach()
    return [value.detach(), *torch.autograd.grad(value, [t for t in tensors if t.requires_grad], gradient)]


def launched_at_once(task, device):
    """On a GPU the task GRAPH times as one CUDA graph: the kernels' time then shows, not that to launch them."""
    if device != "cuda":
        return task
    other = torch.cuda.Stream()  # where PyTorch wants a task warmed up before it is captured
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        for _ in range(3):
            task()
    torch.cuda.current_stream().wait_stream(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH):
            task()
    return graph.replay


def measure(tasks, device, calls=1):
    """Seconds per call: {"median", "spread", "best"} of each task, from rounds that visit all of them in turn.

    calls: how often a task runs what is measured.
    """
    def seconds(task, repeats):
        wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            task()
        wait(device)
        return (time.perf_counter() - start) / repeats / calls

    repeats, found = {}, {name: [] for name in tasks}
    for name, task in tasks.items():
        seconds(task, 2)  # warm up
        repeats[name] = max(1, min(1000, int(0.02 / calls / seconds(task, 1))))
    for _ in range(ROUNDS):
        for name, task in tasks.items():
            found[name].append(seconds(task, repeats[name]))
    summary = {}
    for name, values in found.items():
        low, median, high = statistics.quantiles(values, n=4)
        summary[name] = {"median": median, "spread": (high - low) / 2, "best": min(values)}
    return summary


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def show(timing):
    """Milliseconds."""
    return f"{digits(timing['median'] * 1e3, 3)} +-{digits(timing['spread'] * 1e3, 1)} ms"


def digits(value, count):
    return f"{float(f'{value:.{count}g}'):g}"  # 1080 for 1.08e+03


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


def keep_freed_memory():
    """Large tensors then reuse memory: as new pages of Linux's each would take longer to come than to be worked on."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-4, 0)  # M_MMAP_MAX
        library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def beyond_the_cache(shape, device, free):
    """The shape with so many samples that a tensor is four times as large as the last cache, or None.

    None if `free` bytes are too few for that.
    """
    if device == "cuda":
        cache, free = torch.cuda.get_device_properties(0).L2_cache_size, torch.cuda.mem_get_info()[0]
    else:
        sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        cache = max((int(size[:-1]) * 2**{"K": 10, "M": 20}[size[-1]] for size in sizes), default=2**25)
    samples = shape[0]
    while 4 * samples * torch.Size(shape[1:]).numel() < 4 * cache:
        samples *= 2
    shape = (samples, *shape[1:])
    return shape if 12 * 4 * torch.Size(shape).numel() < free else None  # the reference keeps up to ten of its size
