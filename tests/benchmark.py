"""How fast is a training step, beside a plain PyTorch loop of the same networks in the text's manner? Run by hand.

    python tests/benchmark.py [03 04 ...] [--threads N] [--device cpu] [--rounds N]

The plain loop reads each image with PIL and torchvision's transforms through a DataLoader, as the text does, forms the
penalty by autograd, and uses Adam as it comes. It and the script's own loop, data and log included, take turns in one
process; medians and half interquartile ranges of all rounds are printed. The floor is the time that the products of the
script's step would take at the rate of one of them alone: `FLOP / rate`, matrix products and convolutions apart.
"""

import argparse
import collections
import contextlib
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

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import common
from conftest import SCRIPTS, load_script

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


def measure(script, flags, rounds):
    """Seconds per step of the script's loop and of the plain one, [rounds] each, and the FLOP of one step by operation."""
    ours, theirs, flop, steps, count = [], [], {}, common.Run.steps, STEPS[script[:2]]

    def timed(run):
        inner, other = steps(run), plain(script, run.args)

        def turn(times, advance):
            wait(run.args.device)
            start = time.perf_counter()
            yield from advance
            wait(run.args.device)
            times.append((time.perf_counter() - start) / count)

        def own():
            for _ in range(count):
                yield next(inner)

        yield next(inner)
        with Flop() as counter:
            yield next(inner)
        flop.update(counter.count)
        yield from own()
        next(other)
        for _ in range(rounds):
            yield from turn(ours, own())
            for _ in turn(theirs, (None for _ in range(count) if next(other) or True)):
                pass
        raise Done

    common.Run.steps = timed
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Done), contextlib.redirect_stdout(None):
            load_script(script).main(["--dataset", "digits", "--eval-interval", "0", "--output-dir", folder, *flags])
    finally:
        common.Run.steps = steps
    return ours, theirs, flop


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=[script[:2] for script in SCRIPTS], help="01 to 06 (default: all)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; ms per generator step")
    print(f"{'script':24}{'own':>18}{'plain':>18}{'times':>7}{'images/s':>10}{'GFLOP':>7}{'floor':>8}{'of floor':>9}")
    for script in SCRIPTS:
        if script[:2] in args.scripts:
            flags = ["--device", args.device, *["--progressive", "off"] * script.startswith("06")]
            ours, theirs, flop = measure(script, flags, args.rounds)
            least, median = floor(script, flop, args.device), statistics.median(ours)
            batch = next(iter(load_script(script).CONSTANTS.values()))["batch_size"]
            print(f"{script:24}{show(ours):>18}{show(theirs):>18}{statistics.median(theirs) / median:7.2f}"
                  f"{batch / median:10.0f}{sum(flop.values()) / 1e9:7.2f}{least * 1e3:8.1f}{least / median:9.0%}", flush=True)


if __name__ == "__main__":
    main()
