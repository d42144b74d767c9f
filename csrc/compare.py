"""--compare-kernels: is the fused operation right, and what does it gain? A table of shapes, then the training step."""

import copy
import json
import re
import statistics
import time
from pathlib import Path

import torch

from csrc import ops

ROUNDS = 9  # interleaved, so that a busy neighbour slows all alike
TOLERANCE = 1e-4  # of float32 results against float64; d_strength sums up what nearly cancels
SHAPES = {"gradient_penalty": [(64,), (300,), (4096,)],  # batches of the script's own critic and images
          "adain": [(32, 64, 4, 4), (32, 64, 8, 8), (32, 32, 16, 16), (32, 16, 32, 32),  # 06's own
                    (16, 512, 4, 4), (16, 256, 32, 32), (16, 128, 64, 64),
                    (32, 64, 128, 128)]}  # 134 MB, more than most last caches hold
GRAPH = 20  # calls in a CUDA graph: what it takes to launch one does not count
PASSES = 5  # of adain over its tensor, forward and backward


def compare_kernels(args, formula, step, critic=None, real=None):
    """--compare-kernels: check and time the operation that serves `formula` against the formula and torch.compile.

    formula: a function under @fused, of this critic and real [N, ...] if it is the gradient penalty; step: one training
    step, timed with the operation and without. The table is printed and goes into a JSON file of the output folder.
    Exits with code 1 where the operation is wrong.
    """
    kind, device, path = formula.kernel, args.device, Path(args.output_dir, f"{args.script}-kernels.json")
    ops.choose("fused", device)
    table = {"kernel": kind, "machine": machine(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
             "dtype": "float32", "date": time.strftime("%Y-%m-%d"), "rows": []}
    print(f"compare {kind} on {table['machine']}, {table['threads']} threads, torch {torch.__version__}, float32; "
          f"medians of {ROUNDS} rounds, +- half the interquartile range\n"
          f"{'forward and backward':22}{'reference':>20}{'fused':>20}{'torch.compile':>20}  gain   "
          f"{'GB/s  of copy   ' * (kind == 'adain')}errors, by float64")
    for shape in SHAPES[kind]:
        row = compare_shape(formula, shape, device, critic, real)
        table["rows"].append(row)
        rates = f"{row['bandwidth'] / 1e9:6.1f}{row['of_copy']:9.2f}" if kind == "adain" else ""
        errors = ", ".join(f"{error:.0e}" if isinstance(error, float) else error for error in row["errors"].values())
        print(f"{line('x'.join(map(str, shape)), row['seconds'])} {rates}   {errors}", flush=True)
    table["training_step"] = measure({"reference": ops.without_kernels()(step), "fused": step}, device)
    print(line("training step", table["training_step"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    print(f"saved   {path}")
    if not all(row["errors"]["fused"] <= TOLERANCE for row in table["rows"]):  # nor NaN
        raise SystemExit("the fused operation is wrong")


def compare_shape(formula, shape, device, critic, real):
    """One row of the table: errors against float64, seconds and, of AdaIN, bandwidth."""
    kind = formula.kernel
    torch._dynamo.reset()  # else it would try to compile one function for all shapes
    functions = {"reference": formula.formula, "fused": formula,
                 "torch.compile": torch.compile(formula.formula, dynamic=False)}
    few = (max(1, min(shape[0], 2**23 * shape[0] // torch.Size(shape).numel())), *shape[1:])  # float64 takes room
    exact = results(formula.formula, inputs(few, device, torch.float64, critic, real))
    errors, tensors = {}, inputs(shape, device, torch.float32, critic, real)
    for name, function in functions.items():
        try:
            found = results(function, inputs(few, device, torch.float32, critic, real))
            errors[name] = torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, exact)]).max().item()
        except RuntimeError as error:  # torch.compile does not differentiate twice
            errors[name] = str(error).splitlines()[0][:80]
    tasks = {name: lambda f=f: results(f, tensors) for name, f in functions.items() if isinstance(errors[name], float)}
    if kind != "adain":
        return {"shape": shape, "errors": errors, "seconds": measure(tasks, device)}
    target, calls = torch.empty_like(tensors[0]), GRAPH if device == "cuda" else 1
    tasks["copy"] = lambda: target.copy_(tensors[0].detach())
    times = measure({name: launched_at_once(task, device) for name, task in tasks.items()}, device, calls)
    bandwidth = PASSES * target.nbytes / times["fused"][0]
    return {"shape": shape, "errors": errors, "bandwidth": bandwidth,
            "of_copy": bandwidth * times.pop("copy")[0] / (2 * target.nbytes), "seconds": times}


def line(title, times):
    """The beginning of a row: milliseconds, and how many times as fast as the reference the fused operation is."""
    cells = [f"{1e3 * middle:.3g} +-{1e3 * spread:.1g} ms" for middle, spread in times.values()]
    gain = times["reference"][0] / times["fused"][0]
    return f"{title:22}" + "".join(f"{cell:>20}" for cell in [*cells, "-"][:3]) + f"{gain:6.2f}"


def inputs(shape, device, dtype, critic, real):
    """What the formula takes in one case, the same numbers in every dtype; what gets a gradient requires one."""
    rng = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=rng).to(device, dtype)

    if critic:
        return copy.deepcopy(critic).to(dtype), *(normal(*shape, *real.shape[1:]) for _ in range(2))
    x, scale, bias, strength = normal(*shape), normal(*shape[:2]), normal(*shape[:2]), normal(1)
    trained = [tensor.requires_grad_() for tensor in (x, scale, bias, strength)]
    return [*trained[:3], normal(shape[0], 1, *shape[2:]), trained[3]]


def results(function, given):
    """The value and every gradient, of the penalty or of the sum of AdaIN's squares halved: dy = y."""
    if isinstance(given[0], torch.Tensor):
        value = function(*given, slope=0.2)
        return [value.detach(), *torch.autograd.grad(value, [t for t in given if t.requires_grad], value.detach())]
    torch.manual_seed(0)  # epsilon and Dropout's masks
    penalty, _ = function(*given)
    weights = [weight for weight in given[0].parameters() if weight.dim() > 1]  # the biases' gradients are 0
    return [penalty.detach(), *torch.autograd.grad(penalty, weights)]


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

    repeats = {name: int(0.02 / calls / max(seconds(task, 2), seconds(task, 1))) or 1 for name, task in tasks.items()}
    rounds = [{name: seconds(task, repeats[name]) for name, task in tasks.items()} for _ in range(ROUNDS)]
    quartiles = {name: statistics.quantiles([each[name] for each in rounds], n=4) for name in tasks}
    return {name: (middle, (high - low) / 2) for name, (low, middle, high) in quartiles.items()}


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return next(iter(re.findall(r"model name\s*: (.*)", info)), "an unknown processor")
