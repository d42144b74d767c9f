"""--compare-kernels: are the fused kernels right, and what do they gain? A table of shapes, then the training step."""

import json
import platform
import re
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
LARGE = {"penalty": (64, 49152), "adain": (16, 64, 128, 128)}  # to be enlarged beyond the last cache
GRAPH = 20  # calls in a CUDA graph: what it takes to launch one does not count
PASSES = {"penalty": 3, "adain": 5}  # over the tensor, forward and backward


def compare_kernels(args, formula, step):
    """--compare-kernels: check and time the kernel that serves `formula` against the formula itself and torch.compile.

    formula: a function under @fused; step: one training step, timed with the kernels and without. The table is printed
    and goes into a JSON file of the output folder. Exits with code 1 where the kernel is wrong.
    """
    def without():
        with ops.without_kernels():
            step()

    kind, device, path = formula.kernel, args.device, Path(args.output_dir, f"{args.script}-kernels.json")
    ops.choose("fused", device)
    table = {"kernel": kind, "machine": machine(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
             "dtype": "float32", "date": time.strftime("%Y-%m-%d"), "rows": []}
    print(f"compare {kind} on {table['machine']}, {table['threads']} threads, torch {torch.__version__}, float32; "
          f"medians of {ROUNDS} rounds, +- half the interquartile range{'; as CUDA graphs' * (device == 'cuda')}\n"
          f"{'forward and backward':22}{'reference':>20}{'fused':>20}{'torch.compile':>20}  gain   GB/s  of copy   errors")
    for shape in [*SHAPES[kind], beyond_the_cache(LARGE[kind], device)]:
        row = compare_shape(formula, shape, device)
        table["rows"].append(row)
        print(f"{line('x'.join(map(str, shape)), row['seconds'])}{row['bandwidth'] / 1e9:7.1f}{row['of_copy']:9.2f}   "
              f"{', '.join(f'{error:.0e}' for error in row['errors'].values())}", flush=True)
    table["training_step"] = measure({"reference": without, "fused": step}, device)
    print(line("training step", table["training_step"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"saved   {path}")
    if not all(row["errors"]["fused"] <= TOLERANCE for row in table["rows"]):  # nor NaN
        raise SystemExit("a fused kernel is wrong")


def compare_shape(formula, shape, device):
    """One row of the table: errors against float64, seconds, bandwidth."""
    kind = formula.kernel
    torch._dynamo.reset()  # else it would try to compile one function for all shapes
    functions = {"reference": formula.formula, "fused": formula,
                 "torch.compile": torch.compile(formula.formula, dynamic=False)}
    few = (max(1, min(shape[0], 2**23 * shape[0] // torch.Size(shape).numel())), *shape[1:])  # float64 takes room
    exact = results(kind, formula.formula, inputs(kind, few, device, torch.float64))
    errors = {name: torch.stack([(a - b).norm() / b.norm() for a, b in zip(
        results(kind, function, inputs(kind, few, device)), exact)]).max().item() for name, function in functions.items()}
    tensors = inputs(kind, shape, device)
    copy, calls = torch.empty_like(tensors[0]), GRAPH if device == "cuda" else 1
    tasks = {name: lambda f=f: results(kind, f, tensors) for name, f in functions.items()}
    tasks["copy"] = lambda: copy.copy_(tensors[0].detach())
    times = measure({name: launched_at_once(task, device) for name, task in tasks.items()}, device, calls)
    bandwidth = PASSES[kind] * copy.nbytes / times["fused"][0]
    return {"shape": shape, "errors": errors, "seconds": times, "bandwidth": bandwidth,
            "of_copy": bandwidth * times.pop("copy")[0] / (2 * copy.nbytes)}


def line(title, times):
    """The beginning of a row: milliseconds, and how many times as fast as the reference the fused kernel is."""
    cells = [f"{1e3 * middle:.3g} +-{1e3 * spread:.1g} ms" for middle, spread in times.values()]
    gain = times["reference"][0] / times["fused"][0]
    return f"{title:22}" + "".join(f"{cell:>20}" for cell in [*cells, ""][:3]) + f"{gain:6.2f}"


def inputs(kind, shape, device, dtype=torch.float32):
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


def results(kind, function, tensors):
    """The value and every gradient, of the penalty or of the sum of AdaIN's squares halved: dy = y."""
    value = function(*tensors)[0] if kind == "penalty" else function(*tensors, slope_after=0.2)
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
    """Seconds per call, {task: (median, half the interquartile range)}, from rounds that visit all tasks in turn.

    calls: how often a task runs what is measured.
    """
    def seconds(task, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            task()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats / calls

    repeats = {name: max(1, int(0.02 / calls / max(seconds(task, 2), seconds(task, 1)))) for name, task in tasks.items()}
    rounds = [{name: seconds(task, repeats[name]) for name, task in tasks.items()} for _ in range(ROUNDS)]
    quartiles = {name: statistics.quantiles([each[name] for each in rounds], n=4) for name in tasks}
    return {name: (middle, (high - low) / 2) for name, (low, middle, high) in quartiles.items()}


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def beyond_the_cache(shape, device):
    """The shape with so many samples that a tensor is four times as large as the last cache."""
    if device == "cuda":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
    else:
        sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        cache = max((int(size[:-1]) * 2**{"K": 10, "M": 20}[size[-1]] for size in sizes), default=2**25)
    samples = shape[0]
    while samples * torch.Size(shape[1:]).numel() < cache:
        samples *= 2
    return samples, *shape[1:]
