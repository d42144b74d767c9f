"""How fast is a training step, beside a plain PyTorch loop of the same networks in the text's manner? Run by hand.

    python tests/benchmark.py [03 04 ...] [--threads N] [--device cpu] [--rounds N]
    python tests/benchmark.py [03 04 ...] --memory [--threads N] [--device cpu]
    python tests/benchmark.py [03 04 ...] --growth [--threads N] [--device cpu]

The plain loop reads each image with PIL and torchvision's transforms through a DataLoader, as the text does, forms the
penalty by autograd, and uses Adam as it comes. It and the script's own loop, data and log included, take turns in one
process; medians and half interquartile ranges of all rounds are printed. The floor is the time that the products of the
script's step would take at the rate of one of them alone: `FLOP / rate`, matrix products and convolutions apart.

--memory trains each script for ten steps, in a process of its own, and prints the most memory that this took: the
process's resident memory (Linux), or with --device cuda what PyTorch allocated there. Beside it stands the most that it
took to import everything and to load the data.

--growth times each script's own steps at several batch sizes, widths and image sizes. It prints a table and draws
docs/growth.png. A point that would take more than 20 s is left out.
"""

import argparse
import collections
import contextlib
import itertools
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import flop_registry
from torchvision import transforms

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import common
from conftest import ROOT, SCRIPTS, load_script
from csrc.compare import digits, machine, wait

STEPS = {"01": 40, "02": 2, "03": 6, "04": 6, "05": 2, "06": 1}  # of a turn
GROWTH = [  # the panels: title, unit, flags of all its lines; the lines: script, flag, values
    ("batch size", "samples per step", [], [(script, "--batch-size", (16, 32, 64, 128, 256)) for script in SCRIPTS]),
    ("width, latent dimensions (batch 32, 32x32)", "channels at 4x4 and 8x8, or dimensions", ["--batch-size", "32"],
     [(SCRIPTS[5], flag, (32, 64, 128, 256)) for flag in ("--width", "--latent-dim")]),
    ("image size (batch 16)", "pixels in height and width", ["--batch-size", "16"],
     [(SCRIPTS[1], "--image-size", (28, 64)), (SCRIPTS[5], "--image-size", (32, 64, 128))]),  # 02: other networks at 64
]


class Images(Dataset):
    """What torchvision's MNIST does for every image, with the text's transform."""

    def __init__(self, size):
        self.images, self.labels = common.draw_digits("train")
        self.transform = transforms.Compose([*[transforms.Pad(2)] * (size == 32), transforms.ToTensor(),
                                             transforms.Normalize((0.5,), (0.5,))])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index, 0].numpy())), int(self.labels[index])


def endless(args):
    """Batches (images, labels) on the device, epoch after epoch."""
    loader = DataLoader(Images(getattr(args, "image_size", 28)), args.batch_size, shuffle=True, drop_last=True)
    while True:
        for images, labels in loader:
            yield images.to(args.device), labels.to(args.device)


def noise(args):
    z = torch.rand(args.batch_size, args.latent_dim) if getattr(args, "noise", "uniform") == "uniform" else None
    return (torch.randn(args.batch_size, args.latent_dim) if z is None else z * 2 - 1).to(args.device)


def plain_gan(args, generator, discriminator):
    """The loop of 実装例2: 01, 02 and 05. One step per `next`."""
    loss = nn.BCEWithLogitsLoss()
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, (args.beta1, args.beta2))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, (args.beta1, args.beta2))
    for real, _ in endless(args):
        valid, fake = torch.ones(len(real), 1, device=args.device), torch.zeros(len(real), 1, device=args.device)
        optimizer_d.zero_grad()
        z = torch.randn(len(real), args.latent_dim, device=args.device)
        images = generator(z)
        loss_d = (loss(discriminator(real), valid) + loss(discriminator(images.detach()), fake)) / 2
        loss_d.backward()
        optimizer_d.step()
        optimizer_g.zero_grad()
        loss_g = loss(discriminator(generator(z)), valid)
        loss_g.backward()
        optimizer_g.step()
        yield loss_d.item() + loss_g.item()


def plain_wgan(args, generator, critic):
    """The loop of 11.3.2 and 11.4.2: 03 and 04."""
    conditional = args.script == "04_cgan"
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, (args.beta1, args.beta2))
    optimizer_c = torch.optim.Adam(critic.parameters(), args.lr_d, (args.beta1, args.beta2))
    for real, labels in endless(args):
        c = (labels,) if conditional else ()
        for _ in range(args.n_critic):
            fake = generator(noise(args), *c)
            optimizer_c.zero_grad()
            score_real, score_fake = critic(real, *c).mean(), critic(fake.detach(), *c).mean()
            epsilon = torch.rand(len(real), 1, 1, 1, device=args.device)
            x_hat = (epsilon * real + (1 - epsilon) * fake.detach()).requires_grad_()
            scores = critic(x_hat, *c)
            gradients = torch.autograd.grad(scores, x_hat, torch.ones_like(scores), create_graph=True)[0]
            penalty = ((gradients.flatten(1).norm(2, dim=1) - 1)**2).mean() * args.gp_weight
            (score_fake - score_real + penalty).backward()
            optimizer_c.step()
        c = (torch.randint(0, 10, (len(real),), device=args.device),) if conditional else ()
        fake = generator(noise(args), *c)
        optimizer_g.zero_grad()
        (-critic(fake, *c).mean()).backward()
        optimizer_g.step()
        yield


def plain_stylegan(args, generator, discriminator):
    """06's losses and R1, written out; no listing of the text has a loop for it."""
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, (args.beta1, args.beta2))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, (args.beta1, args.beta2))
    for real, _ in endless(args):
        real.requires_grad_()
        optimizer_d.zero_grad()
        fake = generator(torch.randn(len(real), args.latent_dim, device=args.device))
        real_logits, fake_logits = discriminator(real), discriminator(fake.detach())
        gradient = torch.autograd.grad(real_logits.sum(), real, create_graph=True)[0]
        loss_d = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
        loss_d = loss_d + args.r1_weight / 2 * gradient.square().sum((1, 2, 3)).mean()
        loss_d.backward()
        optimizer_d.step()
        optimizer_g.zero_grad()
        fake = generator(torch.randn(len(real), args.latent_dim, device=args.device))
        loss_g = F.softplus(-discriminator(fake)).mean()
        loss_g.backward()
        optimizer_g.step()
        yield loss_d.item() + loss_g.item()


def plain(script, args):
    """The plain loop of a script with its networks, fresh ones, on PyTorch's own operations."""
    module = load_script(script)
    if script.startswith("06"):
        shape = args.image_size, args.channels, args.width
        pair, loop = (module.Generator(args.latent_dim, *shape), module.Discriminator(*shape)), plain_stylegan
    else:
        critic = getattr(module, "Critic", None) or module.Discriminator
        pair, loop = (module.Generator(args.latent_dim), critic()), plain_wgan if hasattr(module, "Critic") else plain_gan
    for network in pair:
        for name, layer in list(network.named_modules()):
            if isinstance(layer, common.Dropout):  # the text's
                network.set_submodule(name, nn.Dropout(0.5))
    return loop(args, *(network.to(args.device) for network in pair))


class Flop(TorchDispatchMode):
    """Counts the floating-point operations of products. (FlopCounterMode refuses autograd.grad.)"""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result, operator = function(*arguments, **(options or {})), function._overloadpacket
        if operator in flop_registry:
            self.count[str(operator)] += flop_registry[operator](*arguments, **(options or {}), out_val=result)
        return result


class Done(Exception):
    pass


def drive(script, flags, loop):
    """Run a script's training on drawn digits until loop(run, steps), a generator in place of run.steps(), ends."""
    steps = common.Run.steps

    def driven(run):
        run.steps_per_epoch = sys.maxsize
        yield from loop(run, steps(run))
        raise Done

    common.Run.steps = driven
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Done), contextlib.redirect_stdout(None):
            load_script(script).main(["--dataset", "digits", "--eval-interval", "0", "--output-dir", folder, *flags])
    finally:
        common.Run.steps = steps


def turn(times, steps, count, device):
    """Passes on `count` of the steps and adds the seconds per step to `times`."""
    wait(device)
    start = time.perf_counter()
    yield from itertools.islice(steps, count)
    wait(device)
    times.append((time.perf_counter() - start) / count)


def measure(script, flags, rounds):
    """Seconds per step of the script's loop and of the plain one, [rounds] each, and the FLOP of one step by operation."""
    ours, theirs, flop, count = [], [], {}, STEPS[script[:2]]

    def timed(run, inner):
        other = plain(script, run.args)
        yield next(inner)
        with Flop() as counter:
            yield next(inner)
        flop.update(counter.count)
        yield from itertools.islice(inner, count)
        next(other)
        for _ in range(rounds):
            yield from turn(ours, inner, count, run.args.device)
            for _ in turn(theirs, other, count, run.args.device):
                pass

    drive(script, flags, timed)
    return ours, theirs, flop


def memory(script, flags):
    """The peaks of this process in MB: once the data are loaded, and after ten steps."""
    import resource  # not on Windows

    peaks, prepare = [], common.prepare

    def read(device):
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peaks.append((torch.cuda.max_memory_allocated() if device == "cuda" else resident) / 1e6)

    def prepared(args, **settings):
        data = prepare(args, **settings)
        read(args.device)
        return data

    def ten(run, inner):
        yield from itertools.islice(inner, 10)
        read(run.args.device)

    common.prepare = prepared  # for good: the process ends with this
    # Random pixels: drawing digits takes more memory than some trainings on them do.
    common.draw_digits = lambda split: (torch.randint(256, (60_000, 1, 28, 28), dtype=torch.uint8),
                                        torch.arange(60_000) % 10)
    drive(script, flags, ten)
    return peaks


def growth(script, flags):
    """Milliseconds per step, the median of three or more turns of 0.2 s; NaN if they would take more than 20 s."""
    trial, times = [], []

    def timed(run, inner):
        for _ in range(2):  # the first step is slower
            yield from turn(trial, inner, 1, run.args.device)
        if 4 * trial[-1] > 20:  # the warm-up and three turns
            return
        count, end = math.ceil(0.2 / trial[-1]), time.perf_counter() + 2
        yield from turn(trial, inner, count, run.args.device)
        while len(times) < 3 or time.perf_counter() < end:
            yield from turn(times, inner, count, run.args.device)

    drive(script, flags, timed)
    return statistics.median(times) * 1e3 if times else math.nan


def rate(work, flop, device):
    """FLOP per second of a single operation, the best of nine."""
    def seconds():
        wait(device)
        start = time.perf_counter()
        for _ in range(5):
            work()
        wait(device)
        return (time.perf_counter() - start) / 5
    seconds()
    return flop / min(seconds() for _ in range(9))


def floor(script, flop, device):
    """Seconds that the step's products take at the rates of one matrix product and one convolution of its shapes."""
    batch = {"01": 64, "03": 600, "04": 600}.get(script[:2], 64)
    a, b = torch.randn(batch, 784, device=device), torch.randn(784, 512 if script[:2] == "01" else 128, device=device)
    product = rate(lambda: a @ b, 2 * batch * 784 * b.size(1), device)
    channels, size = (32, 16) if script[:2] == "06" else (128, 14)
    x, kernel = torch.randn(64, channels, size, size, device=device), torch.randn(channels, channels, 3, 3, device=device)
    convolution = rate(lambda: F.conv2d(x, kernel, padding=1), 2 * 64 * channels**2 * 9 * size**2, device)
    return sum(n / (convolution if "conv" in name else product) for name, n in flop.items())


def show(times):
    low, median, high = statistics.quantiles(times, n=4)
    return f"{median * 1e3:9.1f} +-{(high - low) / 2e-3:5.1f}"


def show_memory(flags):
    print(f"{'peak memory in MB':24}{'data loaded':>12}{'training':>10}")
    for script in flags:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads,
                                 [torch.get_num_threads()]) as fresh:
            loaded, training = fresh.submit(memory, script, flags[script]).result()
        print(f"{script:24}{loaded:12.0f}{training:10.0f}", flush=True)


def show_growth(flags, setting):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    figure.suptitle(f"Time of a training step: {setting}")
    for axes, (title, unit, common_flags, lines) in zip(figure.subplots(1, 3, sharey=True), GROWTH):
        sizes = sorted({size for *_, values in lines for size in values})
        print(f"{title:48}" + "".join(f"{size:9}" for size in sizes))
        axes.set(title=title, xlabel=unit, yscale="log")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, sizes)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
        for script, flag, values in lines:
            if script in flags:
                times = {size: growth(script, [*flags[script], *common_flags, flag, str(size)]) for size in values}
                cells = [digits(times[size], 3) if size in times else "" for size in sizes]
                print(f"  {script[:2]} {flag:43}" + "".join(f"{cell:>9}" for cell in cells), flush=True)
                axes.plot(times.keys(), times.values(), "o--" if flag == "--latent-dim" else "o-",
                          color=f"C{SCRIPTS.index(script)}", label=f"{script[:2]} {flag}")
        axes.legend(handles=axes.lines)
    figure.get_axes()[0].set_ylabel("milliseconds per generator step")
    figure.savefig(ROOT / "docs" / "growth.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=[script[:2] for script in SCRIPTS], help="01 to 06 (default: all)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--growth", action="store_true", help="draw docs/growth.png instead")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    flags = {script: ["--device", args.device, *["--progressive", "off"] * script.startswith("06")]
             for script in SCRIPTS if script[:2] in args.scripts}
    setting = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    if args.memory:
        print(f"{args.device}, {setting}")
        return show_memory(flags)
    if args.growth:
        return show_growth(flags, f"{machine(args.device)}, {setting}")
    print(f"{args.device}, {setting}; ms per generator step")
    print(f"{'script':24}{'own':>18}{'plain':>18}{'times':>7}{'images/s':>10}{'GFLOP':>7}{'floor':>8}{'of floor':>9}")
    for script, arguments in flags.items():
        ours, theirs, flop = measure(script, arguments, args.rounds)
        least, median = floor(script, flop, args.device), statistics.median(ours)
        batch = next(iter(load_script(script).CONSTANTS.values()))["batch_size"]
        print(f"{script:24}{show(ours):>18}{show(theirs):>18}{statistics.median(theirs) / median:7.2f}"
              f"{batch / median:10.0f}{sum(flop.values()) / 1e9:7.2f}{least * 1e3:8.1f}{least / median:9.0%}", flush=True)


if __name__ == "__main__":
    main()
