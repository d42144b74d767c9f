"""How fast is a training step, beside a plain PyTorch loop of the same networks in the text's manner? Run by hand.

    python docs/benchmark.py [03 04 ...] [--rounds N] [--device cuda] [flags of the scripts, as --batch-size]

The plain loop reads each image with PIL and torchvision's transforms through a DataLoader, as the text does, forms the
penalty by autograd, and uses Adam as it comes. It and the script's own loop, data and log included, take turns in one
process; medians and half interquartile ranges of all rounds are printed. The floor is the time that the products of the
script's step would take at the rate of one of them alone: `FLOP / rate`, matrix products and convolutions apart.
"""

import argparse
import collections
import contextlib
import io
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import flop_registry
from torchvision import transforms

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1])]
import common
from conftest import SCRIPTS, load_script
from csrc import ops
from csrc.compare import machine

STEPS = {"01": 40, "02": 2, "03": 6, "04": 6, "05": 2, "06": 1}  # of a turn


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
    loader = DataLoader(Images(args.image_size), args.batch_size, shuffle=True, drop_last=True)
    while True:
        for images, labels in loader:
            yield images.to(args.device), labels.to(args.device)


def noise(args):
    return load_script(args.script).generate_noise(args.batch_size, args, args.device)


def plain_gan(args, generator, discriminator):
    """The loop of 実装例2: 01, 02 and 05; for 06, of which the text has no loop, with R1. One step per `next`."""
    loss, r1_weight = nn.BCEWithLogitsLoss(), getattr(args, "r1_weight", 0)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, (args.beta1, args.beta2))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, (args.beta1, args.beta2))
    for real, _ in endless(args):
        valid, fake = torch.ones(len(real), 1, device=args.device), torch.zeros(len(real), 1, device=args.device)
        optimizer_d.zero_grad()
        z = noise(args)
        images, logits = generator(z), discriminator(real.requires_grad_(r1_weight > 0))
        loss_d = (loss(logits, valid) + loss(discriminator(images.detach()), fake)) / 2
        if r1_weight:
            gradient = torch.autograd.grad(logits.sum(), real, create_graph=True)[0]
            loss_d = loss_d + r1_weight / 2 * gradient.square().sum((1, 2, 3)).mean()
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


def plain(script, args):
    """The plain loop of a script with its networks, fresh ones."""
    module, wgan = load_script(script), script[:2] in ("03", "04")
    loop, make_critic = (plain_wgan, module.Critic) if wgan else (plain_gan, module.Discriminator)
    shape = (args.image_size, args.channels, args.width) if script.startswith("06") else ()
    pair = module.Generator(args.latent_dim, *shape), make_critic(*shape)
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
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Done), contextlib.redirect_stdout(io.StringIO()):
            load_script(script).main(["--dataset", "digits", "--eval-interval", "0", "--output-dir", folder, *flags])
    finally:
        common.Run.steps = steps


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def turn(times, steps, count, device):
    """Passes on `count` of the steps and adds the seconds per step to `times`."""
    wait(device)
    start = time.perf_counter()
    yield from itertools.islice(steps, count)
    wait(device)
    times.append((time.perf_counter() - start) / count)


def measure(script, flags, rounds):
    """Seconds per step of the script's loop and of the plain one, [rounds] each, and one step's FLOP by operation."""
    ours, theirs, flop, count = [], [], {}, STEPS[script[:2]]

    def timed(run, inner):
        other = plain(script, run.args)
        yield next(inner)
        with Flop() as counter:
            yield next(inner)
        flop.update(counter.count)
        for _ in range(rounds + 1):
            yield from turn(ours, inner, count, run.args.device)
            with ops.without_kernels():
                for _ in turn(theirs, other, count, run.args.device):
                    pass

    drive(script, flags, timed)
    return ours[1:], theirs[1:], flop  # the first turn warms up


def rate(work, flop, device):
    """FLOP per second of a single operation, the best of ten turns."""
    times = []
    for _ in range(10):
        for _ in turn(times, (work() for _ in range(5)), 5, device):
            pass
    return flop / min(times)


def floor(script, flop, device):
    """Seconds that the step's products take at the rates of one matrix product and one convolution of its shapes."""
    batch, outputs = {"01": (64, 512), "03": (600, 128), "04": (600, 128)}.get(script[:2], (64, 128))
    a, b = torch.randn(batch, 784, device=device), torch.randn(784, outputs, device=device)
    product = rate(lambda: a @ b, 2 * batch * 784 * outputs, device)
    channels, size = (32, 16) if script[:2] == "06" else (128, 14)
    x = torch.randn(64, channels, size, size, device=device)
    kernel = torch.randn(channels, channels, 3, 3, device=device)
    convolution = rate(lambda: F.conv2d(x, kernel, padding=1), 2 * 64 * channels**2 * 9 * size**2, device)
    return sum(n / (convolution if "conv" in name else product) for name, n in flop.items())


def show(times):
    low, median, high = torch.tensor(times).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{median * 1e3:9.1f} +-{(high - low) / 2e-3:5.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=[script[:2] for script in SCRIPTS], metavar="SCRIPT",
                        help="01 to 06 (default: all); flags that are not listed here go to the scripts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    args, more = parser.parse_known_args()
    flags = {script: ["--device", args.device, *["--progressive", "off"] * script.startswith("06"), *more]
             for script in SCRIPTS if script[:2] in args.scripts}
    print(f"{machine(args.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'ms per generator step':24}{'own':>18}{'plain':>18}{'times':>7}{'GFLOP':>7}{'floor':>8}{'of floor':>9}")
    for script, arguments in flags.items():
        ours, theirs, flop = measure(script, arguments, args.rounds)
        least, median = floor(script, flop, args.device), statistics.median(ours)
        print(f"{script:24}{show(ours):>18}{show(theirs):>18}{statistics.median(theirs) / median:7.2f}"
              f"{sum(flop.values()) / 1e9:7.2f}{least * 1e3:8.1f}{least / median:9.0%}", flush=True)


if __name__ == "__main__":
    main()
