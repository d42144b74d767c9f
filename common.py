"""Plumbing of the numbered scripts: everything that has no equation and is the same in all of them.

1  Command line    flags, their checks, and the options of a run
2  Data            real MNIST, digits drawn from fonts, the text's eight Gaussians; batches
3  Pictures        image grids, scatter plots, curves, the film of a training
4  Pipeline        the text's image-generation pipeline (section 3.6) around one generator
5  Run             the folder, the epoch line, the log and the checkpoint of one training

A reader who follows the text can skip this file: no network, loss or training step is in it.
"""

import argparse
import contextlib
import functools
import gzip
import http.client
import itertools
import json
import math
import os
import platform
import queue
import shlex
import socket
import struct
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# 1  Command line
# ---------------------------------------------------------------------------------------------

DEFAULTS = dict(seed=0, device="auto", dataset="auto", data_dir="data", output_dir="runs")
WISHES = {"generate", "interpolate", "explore", "styles"}  # what --from can draw
SAMPLING = WISHES | {"seed", "device", "label"}  # allowed beside --from


def fail(message, code=2):
    """Print one line on stderr and leave; exit code 2 means bad input."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def number(kind, at_least=-math.inf, above=-math.inf, below=math.inf, at_most=math.inf):
    """An argparse type: an int or a finite float within the given bounds."""
    limits = {"of at least": at_least, "above": above, "below": below, "at most": at_most}
    expected = " and ".join(f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit))

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if at_least <= value <= at_most and above < value < below:
                return value
        name = {int: "whole number", float: "number"}[kind]
        raise argparse.ArgumentTypeError(f"expected a {name} {expected}, got {text!r}")
    return parse


class Parser(argparse.ArgumentParser):
    """The command line of one numbered script.

    `constants` is the script's table: a row of option values per variant. The option "variant" picks
    the row, by default the first; --dataset gaussians has a row of its own. Every flag that is not
    given takes the value of its row, so the table is the only place of defaults. `given` is then
    the set of the flags that were given.

    image_sizes: what --image-size offers in a script whose networks come in several sizes; such a
    script also has --channels and takes images of your own, --dataset folder.
    """

    def __init__(self, script, description, constants, image_sizes=()):
        super().__init__(prog=Path(script).name, description=description, allow_abbrev=False,
                         formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30))
        self.constants = constants
        count = dict(type=number(int, at_least=1), metavar="N")
        size = dict(type=number(int, at_least=1, below=100_000), metavar="N")  # what becomes a tensor at once
        rate = dict(type=number(float, above=0, below=1000), metavar="X")
        datasets = ["auto", "mnist", "fashion-mnist", "digits"]
        datasets += ["gaussians"] * ("gaussians" in constants) + ["folder"] * bool(image_sizes)
        self.option("--epochs", "rounds of (samples // batch size) generator steps", **count)
        self.option("--batch-size", "samples per step", type=number(int, at_least=2), metavar="N")  # BatchNorm wants 2
        self.option("--lr-g", "Adam's learning rate, generator", **rate)
        self.option("--lr-d", "Adam's learning rate, discriminator or critic", **rate)
        self.option("--beta1", "Adam's first beta", type=number(float, at_least=0, below=1), metavar="X")
        self.option("--latent-dim", "numbers in one latent vector z", **size)
        self.option("--seed", "seed of all random numbers", type=number(int, at_least=0, below=2**63), metavar="N")
        self.option("--device", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
        self.option("--dataset", "auto: MNIST if it is there or can be fetched, else digits", choices=datasets)
        self.option("--data-dir", "folder that holds, or receives, MNIST/raw" +
                    "; with --dataset folder your images, or a subfolder of them per class" * bool(image_sizes),
                    metavar="DIR")
        if image_sizes:
            self.option("--image-size", "height and width in pixels", type=int, choices=image_sizes)
            self.option("--channels", "1: grey, 3: colour", type=int, choices=(1, 3))
        self.option("--output-dir", "folder that receives the run's folder", metavar="DIR")
        self.option("--sample-interval", "epochs between sample pictures (default: a twentieth of the run)", **count)
        self.option("--checkpoint-interval", "epochs between checkpoints (default: a twentieth of the run)", **count)
        self.option("--max-batches", "at most N generator steps per epoch, for a quick look", **count)
        self.option("--from", "draw from this trained run (folder or checkpoint)", dest="run", metavar="RUN")
        self.option("--generate", "with --from: a picture of N samples (default: 64)", **size)
        self.option("--interpolate", "with --from: paths between latent vectors", action="store_const", const=True)
        self.option("--explore", "with --from: move latent dimension DIM by -3 to 3",
                    type=number(int, at_least=0), metavar="DIM")

    def option(self, flag, help, **settings):
        """Add a flag; its help shows the default, row by row where the rows of the table differ."""
        name = flag.strip("-").replace("-", "_")
        values = {row: table[name] for row, table in self.constants.items() if name in table}
        if len(set(values.values())) == 1:
            values = {"": next(iter(values.values()))}
        default = DEFAULTS.get(name, ", ".join(f"{row} {value}".strip() for row, value in values.items()))
        self.add_argument(flag, help=f"{help} (default: {default})" if default != "" else help, **settings)

    def format_help(self):
        """The help text, with "?" for the Japanese that the terminal's encoding cannot print."""
        encoding = sys.stdout.encoding or "utf-8"
        return super().format_help().encode(encoding, "replace").decode(encoding)

    def error(self, message):
        fail(message)

    def options(self, argv=None):
        """All options of this call as a Namespace, complete and checked; with --from, those of that run."""
        given = {name: value for name, value in vars(self.parse_args(argv)).items() if value is not None}
        self.given = set(given)
        if "run" in given:
            return argparse.Namespace(**self._options_of_run(given))
        for name in sorted(SAMPLING - {"seed", "device"}):
            if name in given:
                fail(f"{self._flag(name)} draws from a trained generator: name its run with --from RUN")
        planar = given.get("dataset") == "gaussians"
        if planar and "variant" in given:
            fail(f"{self._flag('variant')} {given['variant']} is for images; "
                 "--dataset gaussians has networks of its own")
        options = {"script": Path(self.prog).stem, **DEFAULTS, "max_batches": None, "run": None}
        row = given.setdefault("variant", "gaussians" if planar else next(iter(self.constants)))
        options.update(self.constants[row])
        options.update(given)
        for name in ("sample_interval", "checkpoint_interval"):
            options.setdefault(name, max(1, options["epochs"] // 20))
        return argparse.Namespace(**options)

    def _options_of_run(self, given):
        path = Path(given.pop("run"))
        path = Path(path, "checkpoint.pt") if os.path.isdir(path) else path
        if not os.path.isfile(path):
            fail(f"--from: {path} does not exist")
        if given.get("dataset") == "auto":
            del given["dataset"]
        try:
            options = torch.load(path, map_location="cpu", weights_only=True)["options"]
            script, latent_dim = options["script"], options["latent_dim"]
        except Exception as error:  # noqa: BLE001  whatever a damaged or foreign file raises
            fail(f"--from: {path} is not a checkpoint of these scripts ({type(error).__name__})")
        if script != Path(self.prog).stem:
            fail(f"--from: {path} was trained by {script}.py; give it to that script")
        options = {**self.constants.get(options.get("variant"), {}), **options}  # a run may be older than a flag
        for name, value in given.items():
            if name not in SAMPLING and options.get(name) != value:
                fail(f"{self._flag(name)} {value} contradicts the run, which has {options.get(name)}; "
                     "--from trains nothing")
        if given.get("explore", 0) >= latent_dim:
            fail(f"--explore {given['explore']}: the run's latent dimensions are 0 to {latent_dim - 1}")
        if not WISHES & given.keys():
            given["generate"] = 64
        return {**options, **dict.fromkeys(WISHES), "label": None, "device": "auto", **given, "run": str(path)}

    def _flag(self, name):
        return next(action.option_strings[0] for action in self._actions if action.dest == name)


def pick_device(wanted):
    """The device that `wanted` (auto, cpu, cuda or mps) stands for on this machine."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, here in usable.items() if here)
    if not usable[wanted]:
        fail(f"--device {wanted}: this torch ({torch.__version__}) finds no such device here")
    return wanted


# ---------------------------------------------------------------------------------------------
# 2  Data
# ---------------------------------------------------------------------------------------------

class Data(NamedTuple):
    """Labelled samples on the training device.

    samples: uint8 [N, C, H, W] for images, float32 [N, 2] for points; labels: int64 [N].
    """
    name: str
    samples: torch.Tensor
    labels: torch.Tensor

    def scaled(self, index):
        """Samples at `index` as a network sees them: pixels in [-1, 1] (erratum 13), points as they are."""
        chosen = self.samples[index]
        return chosen.float() / 127.5 - 1 if chosen.dtype == torch.uint8 else chosen

    def batches(self, batch_size):
        """Endless (samples, labels) batches; shuffled anew when fewer than a batch are left."""
        while True:
            order = torch.randperm(len(self.samples), device=self.samples.device)
            for index in order[:len(order) // batch_size * batch_size].split(batch_size):
                yield self.scaled(index), self.labels[index]


def load_data(name, data_dir, split="train", device="cpu", image_size=28, channels=1):
    """The data set `name` (see --dataset), its "train" or "test" split, as Data on `device`.

    Leaves with exit code 2 when a data set named explicitly is neither there nor to be had, when a
    file of it is damaged, and when it does not fit into memory. Only "auto" may end up with other
    data, and says so.
    """
    if name in ("auto", "mnist", "fashion-mnist"):
        kind = torchvision.datasets.FashionMNIST if name == "fashion-mnist" else torchvision.datasets.MNIST
        folder = Path(data_dir, kind.__name__, "raw")
        trouble = None if any(folder.glob("*-ubyte*")) else download(kind, Path(data_dir))
        advice = f"put its four files (raw or .gz, from {kind.mirrors[0]}) into {folder}"
        if not trouble:
            samples, labels = read_mnist(folder, {"train": "train", "test": "t10k"}[split])
            name = "mnist" if name == "auto" else name
        elif name == "auto":
            print(f"no MNIST: {trouble}; training on digits drawn from fonts. For MNIST, {advice}")
            name = "digits"
        else:
            fail(f"--dataset {name}: {trouble}; {advice}")
    if name == "digits":
        samples, labels = draw_digits(split)
    if name == "gaussians":
        samples, labels = draw_gaussians(split)
    elif name == "folder":
        samples, labels = read_folder(Path(data_dir), image_size, channels, device)
    elif (image_size, channels) != (28, 1):
        samples = enlarge(samples, image_size, channels, device)
    return Data(name, samples.to(device), labels.to(device))


def download(kind, data_dir):
    """Fetch a torchvision data set into `data_dir`; return what went wrong, or None."""
    answers = queue.SimpleQueue()

    def probe(mirror):
        try:
            address = mirror + kind.resources[0][0]
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=3).close()
            answers.put(mirror)
        except (OSError, ValueError, http.client.HTTPException):
            answers.put(None)

    for mirror in kind.mirrors:  # threads: looking up a name knows no time limit
        threading.Thread(target=probe, args=(mirror,), daemon=True).start()
    end, answered, raw = time.monotonic() + 3, None, Path(kind.__name__, "raw")
    with contextlib.suppress(queue.Empty):
        replies = (answers.get(timeout=max(0, end - time.monotonic())) for _ in kind.mirrors)
        answered = next((mirror for mirror in replies if mirror), None)
    if not answered:
        return f"it is not in {data_dir / raw} and no download server answered within 3 s"
    try:
        (data_dir / raw).mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)  # torchvision sets none: a stalled server would be waited for without end
        with tempfile.TemporaryDirectory(dir=data_dir) as folder:  # checked there, so that no part of it stays
            type(kind.__name__, (kind,), {"mirrors": [answered]})(folder, download=True)
            for path in Path(folder, raw).glob("*-ubyte"):
                os.replace(path, data_dir / raw / path.name)
    except (OSError, RuntimeError) as error:
        return f"the download failed ({' '.join(str(error).split())})"
    finally:
        socket.setdefaulttimeout(None)


def read_mnist(folder, prefix):
    """Images uint8 [N, 1, 28, 28] and labels int64 [N] from the two IDX files of one split."""
    images = read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
    labels = read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
    if images.shape[1:] != (28, 28):
        height, width = images.shape[1:]
        fail(f"{folder}/{prefix}-images-idx3-ubyte: images of {height}x{width} pixels, expected 28x28")
    if len(images) != len(labels):
        fail(f"{folder}: {len(images)} {prefix} images but {len(labels)} labels; the files do not belong together")
    if labels.max(initial=0) > 9:
        fail(f"{folder}/{prefix}-labels-idx1-ubyte: label {labels.max()} found, expected 0 to 9; fetch the file again")
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()


def read_idx(folder, name, dimensions):
    """One IDX file, raw or .gz, as a uint8 array; leaves with one line if it is damaged or another file."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if os.path.exists(p)), None)
    if path is None:
        fail(f"{folder / name} is missing or locked (raw or .gz), though other files of its data set are there")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
    except EOFError:
        fail(f"{path} is truncated: the compressed data stops early; fetch it again")
    except (OSError, zlib.error) as error:
        fail(f"{path} cannot be read ({error}); fetch it again")
    start = 4 + 4 * dimensions
    if len(content) < start:
        fail(f"{path} is truncated: {len(content)} bytes, its header alone has {start}; fetch it again")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", content[:start])
    if magic != 0x800 + dimensions:  # 0x08: unsigned bytes
        kinds = {0x801: "IDX labels", 0x803: "IDX images"}
        fail(f"{path} holds {kinds.get(magic, 'no IDX data')}, expected {kinds[0x800 + dimensions]}; is it misnamed?")
    expected, found = math.prod(shape), len(content) - start
    if found != expected:
        word = "truncated" if found < expected else "corrupt"
        fail(f"{path} is {word}: {found} data bytes, its header announces {expected}; fetch it again")
    return np.frombuffer(bytearray(content), np.uint8, offset=start).reshape(shape)


FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSerif",
         "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol",
         "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10"]


def draw_glyphs():
    """The ten digits in every font, centred and blurred, [10, fonts, 1, 64, 64] in [0, 1]."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    glyphs = np.zeros((10, len(FONTS), 64, 64), np.float32)
    for column, font in enumerate(FONTS):
        face = ImageFont.truetype(str(folder / f"{font}.ttf"), 58)
        for digit in range(10):
            left, top, right, bottom = face.getbbox(str(digit))
            canvas = Image.new("L", (64, 64))
            corner = 32 - (left + right) / 2, 32 - (top + bottom) / 2
            ImageDraw.Draw(canvas).text(corner, str(digit), fill=255, font=face)
            glyphs[digit, column] = np.asarray(canvas)
    blur = torchvision.transforms.functional.gaussian_blur
    return blur(torch.from_numpy(glyphs / 255), 7, 1.5)[:, :, None]


def draw_digits(split):
    """60,000 training or 10,000 test digits like MNIST's: uint8 [N, 1, 28, 28], labels [N]. Always the same.

    Each is a glyph under a random affine map, cut at a random level: a low level makes a bold stroke.
    """
    count, seed = {"train": (60_000, 1), "test": (10_000, 2)}[split]
    rng = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return torch.rand(count, generator=rng) * (high - low) + low

    labels = torch.randperm(count, generator=rng) % 10
    font = torch.randint(len(FONTS), (count,), generator=rng)
    angle, shear, width, height = uniform(-0.2, 0.2), uniform(-0.3, 0.3), uniform(0.8, 1.1), uniform(0.85, 1.1)
    cos, sin = angle.cos(), angle.sin()
    maps = torch.stack([cos / width, (sin + shear * cos) / width, uniform(-0.1, 0.1),
                        -sin / height, (cos - shear * sin) / height, uniform(-0.1, 0.1)], 1).view(-1, 2, 3)
    level = uniform(0.25, 0.6).view(-1, 1, 1, 1)
    glyphs = draw_glyphs()
    images = torch.empty(count, 1, 28, 28, dtype=torch.uint8)
    for part in torch.arange(count).split(2000):
        grid = F.affine_grid(maps[part], (len(part), 1, 28, 28), align_corners=False)
        drawn = F.grid_sample(glyphs[labels[part], font[part]], grid, align_corners=False)
        images[part] = ((drawn - level[part]) * 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    return images, labels


def draw_gaussians(split):
    """The text's eight Gaussians (example 3, erratum 8): points [N, 2] and the number of their centre [N].

    Centres (+-1, +-1), (+-2, 0), (0, +-2), sigma 0.1, all halved: most coordinates lie in [-1, 1].
    """
    count, seed = {"train": (60_000, 1), "test": (10_000, 2)}[split]
    rng = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1], [2, 0], [-2, 0], [0, 2], [0, -2]], dtype=torch.float32)
    labels = torch.randint(8, (count,), generator=rng)
    return (centres[labels] + 0.1 * torch.randn(count, 2, generator=rng)) / 2, labels


def enlarge(images, image_size, channels, device):
    """uint8 [N, 1, 28, 28] -> [N, channels, image_size, image_size]: a black margin up to 32, then bilinear."""
    check_memory(len(images), image_size, channels, device)
    large = torch.empty(len(images), channels, image_size, image_size, dtype=torch.uint8)
    for part in torch.arange(len(images)).split(1000):
        padded = F.pad(images[part], (2, 2, 2, 2) if image_size != 28 else (0, 0, 0, 0)).float()
        large[part] = F.interpolate(padded, image_size, mode="bilinear").round().byte()
    return large


def read_folder(folder, image_size, channels, device):
    """All images below `folder`: uint8 [N, channels, image_size, image_size] and labels [N], one per subfolder.

    The largest centred square of each is scaled to the size. What cannot be read is named and left out.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        fail(f"--dataset folder: no image ({' '.join(IMG_EXTENSIONS)}) in {folder}; name your folder with --data-dir")
    check_memory(len(paths), image_size, channels, device)
    images, kept, unreadable = np.empty((len(paths), channels, image_size, image_size), np.uint8), [], []
    for path in tqdm(paths, desc="reading", unit="image", disable=None, leave=False, dynamic_ncols=True):
        try:
            with Image.open(path) as image:
                images[len(kept)] = square_pixels(ImageOps.exif_transpose(image), image_size, channels)
                kept.append(path.parent)
        except Exception:  # noqa: BLE001  whatever Pillow raises on a damaged file
            unreadable.append(str(path.relative_to(folder)))
    if unreadable:
        print(f"data    {len(unreadable)} unreadable files left out: {', '.join(unreadable)}")
    if not kept:
        fail(f"--dataset folder: none of the {len(paths)} images in {folder} can be read")
    number_of = {parent: number for number, parent in enumerate(sorted(set(kept)))}
    return torch.from_numpy(images[:len(kept)]), torch.tensor([number_of[parent] for parent in kept])


def square_pixels(image, image_size, channels):
    """The centred square of a Pillow image as uint8 [channels, image_size, image_size]; transparency becomes white."""
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert({1: "L", 3: "RGB"}[channels])
    image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image_size, image_size, channels).transpose(2, 0, 1)


def check_memory(count, image_size, channels, device):
    """Leaves with exit code 2 if so many images do not fit into the memory that is free on this machine."""
    need, free = count * channels * image_size**2, free_memory()
    if device == "cuda":
        free = min(free, torch.cuda.mem_get_info()[0])
    if need > free:
        fail(f"{count} images of {image_size}x{image_size} with {channels} channels take {need / 2**30:.1f} GiB "
             f"of memory, {free / 2**30:.1f} GiB are free; choose a smaller --image-size or fewer images")


def free_memory():
    """Bytes of main memory free for new data, infinite where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


# ---------------------------------------------------------------------------------------------
# 3  Pictures
# ---------------------------------------------------------------------------------------------

def save_picture(samples, columns, path, paths=False):
    """Write a PNG: images [N, C, H, W] in [-1, 1] as a grid (erratum 11), points [N, 2] as a scatter plot.

    With `paths`, each `columns` successive points are one path through the plane.
    """
    if samples.dim() == 4:
        enlarged = F.interpolate(samples, scale_factor=max(1, 64 // samples.size(3)))
        return save_image(enlarged, path, nrow=columns, padding=4, normalize=True, value_range=(-1, 1))
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
    if paths:
        for path_points in samples.split(columns):
            axes.plot(*path_points.T.numpy(), ".-")
    else:
        axes.scatter(*samples.T.numpy(), s=3, alpha=0.5)
    figure.savefig(path, dpi=100)


def save_panels(panels, path):
    """Image grids side by side with a title each; panels: {title: (images [N, C, H, W] in [-1, 1], columns)}."""
    grids = {title: make_grid(images, columns, normalize=True, value_range=(-1, 1), pad_value=1)
             for title, (images, columns) in panels.items()}
    height, width = max(g.size(1) for g in grids.values()), sum(g.size(2) for g in grids.values())
    figure = Figure(figsize=(width / 50 + 0.2 * len(grids), height / 50 + 0.5), layout="constrained")
    ratios = [g.size(2) for g in grids.values()]
    for axes, (title, grid) in zip(np.atleast_1d(figure.subplots(1, len(grids), width_ratios=ratios)), grids.items()):
        axes.imshow(grid.permute(1, 2, 0).numpy())
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(path, dpi=100)


def save_curves(history, plots, path):
    """One panel per plot (title, quantities, {label: value to expect at last}) over the epochs of `history`."""
    figure = Figure(figsize=(5 * len(plots), 3.6), layout="constrained")
    for axes, (title, names, guides) in zip(np.atleast_1d(figure.subplots(1, len(plots))), plots):
        for name in names:
            axes.plot([row["epoch"] for row in history], [row[name] for row in history], label=name,
                      marker="." if len(history) == 1 else None)
        for label, value in guides.items():
            axes.axhline(value, color="gray", linestyle="--", linewidth=1, label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.savefig(path, dpi=100)


def save_film(pictures, path):
    """A looping GIF of PNG files, the last one shown longer."""
    frames = []
    for picture in pictures:
        with Image.open(picture) as image:
            frames.append(image.convert("P", palette=Image.Palette.ADAPTIVE))
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0,
                   duration=[250] * (len(frames) - 1) + [2000])


# ---------------------------------------------------------------------------------------------
# 4  Pipeline
# ---------------------------------------------------------------------------------------------

class Pipeline:
    """The text's image-generation pipeline (section 3.6): generate, interpolate, explore, save.

    generator: z [N, latent_dim] (and labels [N] if the options count `classes`) -> samples.
    draw_noise(count, args, device, generator): the script's latent distribution.
    Each picture's latents are drawn by a generator of its own: the same --seed gives the same
    picture, and the random numbers of a training are left alone. They are not those that a
    training with this seed begins with, either: its weights would be made of the same numbers.
    """

    ROWS, STEPS = 8, 10  # rows of an interpolation or a walk, pictures in a row
    OTHER = 0x5EED5EED  # turns a seed into another one

    def __init__(self, generator, draw_noise, args):
        self.generator, self.args, self.device = generator, args, next(generator.parameters()).device
        self.rows = args.classes or self.ROWS
        self.noise = lambda count: draw_noise(count, args, "cpu", torch.Generator().manual_seed(args.seed ^ self.OTHER))

    def __call__(self, z, labels):
        """Samples on the CPU, in eval mode, without gradients; the generator's mode is restored."""
        inputs = (z, labels) if self.args.classes else (z,)
        was_training = self.generator.training
        self.generator.eval()
        with torch.no_grad():
            parts = [self.generator(*(part.to(self.device) for part in group)).cpu()
                     for group in zip(*(full.split(250) for full in inputs))]
        self.generator.train(was_training)
        return torch.cat(parts)

    def latents(self, count, label=None):
        """z and labels for `count` samples; a conditional generator gets each z under every class, or `label`."""
        classes = self.args.classes
        if classes and label is None:
            index = torch.arange(count)
            return self.noise(math.ceil(count / classes))[index // classes], index % classes
        return self.noise(count), torch.full((count,), label or 0)

    def generate(self, z, labels, path):
        """A grid of samples; with several classes one row per class, one column per z."""
        samples, columns = self(z, labels), math.ceil(math.sqrt(len(z)))
        if self.args.classes and len(labels.unique()) > 1:
            columns = math.ceil(len(z) / self.args.classes)
            cells = samples.new_full((self.args.classes, columns, *samples.shape[1:]), -1)
            cells[labels, torch.arange(len(z)) // self.args.classes] = samples
            samples = cells.flatten(0, 1)
        save_picture(samples, columns, path)

    def interpolate(self, path, label=None):
        """Each row goes from one latent vector to another in a straight line, (1 - t) z1 + t z2."""
        z1, z2 = self.noise(2 * self.rows)[:, None].chunk(2)
        self._rows(torch.lerp(z1, z2, torch.linspace(0, 1, self.STEPS)[None, :, None]), path, label)

    def explore(self, dimensions, path, label=None, one_base=False):
        """Row r moves dimension `dimensions[r]` of a latent vector by -3 to +3 (erratum 16), the rest stands still."""
        z = self.noise(1 if one_base else len(dimensions)).expand(len(dimensions), -1)
        z = z[:, None].repeat(1, self.STEPS, 1)
        for row, dimension in enumerate(dimensions):
            z[row, :, dimension] += torch.linspace(-3, 3, self.STEPS)
        self._rows(z, path, label)

    def _rows(self, z, path, label):
        labels = torch.arange(len(z)) if label is None else torch.full((len(z),), label)
        samples = self(z.flatten(0, 1), labels.repeat_interleave(self.STEPS))
        save_picture(samples, self.STEPS, path, paths=True)


def sample_run(generator, draw_noise, args, styles=None):
    """--from: load the run's generator and write the pictures that were asked for into its samples/.

    styles: what --styles draws, {name: function of the pipeline and a path}.
    """
    checkpoint = torch.load(args.run, map_location="cpu", weights_only=True)
    try:
        generator.load_state_dict(checkpoint.get("average", checkpoint["generator"]))
    except (KeyError, RuntimeError, TypeError, AttributeError):
        fail(f"--from: the generator in {args.run} does not fit its own options; the file is damaged")
    pipeline = Pipeline(generator.to(pick_device(args.device)), draw_noise, args)
    folder = Path(args.run).parent / "samples"

    wishes = {}
    if args.generate:
        wishes[f"generated-{args.generate}"] = functools.partial(
            pipeline.generate, *pipeline.latents(args.generate, args.label))
    if args.interpolate:
        wishes["interpolation"] = functools.partial(pipeline.interpolate, label=args.label)
    if args.explore is not None:
        wishes[f"latent_walk-dim{args.explore}"] = functools.partial(
            pipeline.explore, [args.explore] * pipeline.rows, label=args.label)
    if args.styles:
        wishes |= {name: functools.partial(draw, pipeline) for name, draw in styles.items()}
    for name, draw in wishes.items():
        path = folder / f"{name}{'' if args.label is None else f'-class{args.label}'}-seed{args.seed}.png"
        try:
            folder.mkdir(exist_ok=True)
            draw(path=path)
        except OSError as error:
            fail(f"--from: {path} cannot be written ({error.strerror})")
        print(path)


# ---------------------------------------------------------------------------------------------
# 5  Run
# ---------------------------------------------------------------------------------------------

def prepare(args, classes=0):
    """Before a training: seed, device and data, which it returns; completes `args` with what they turned out to be.

    classes: how many a conditional generator knows, 0 for one that takes no labels.
    """
    torch.manual_seed(args.seed)
    args.device = pick_device(args.device)
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output-dir {args.output_dir}: {error.strerror}")
    if not os.access(args.output_dir, os.W_OK | os.X_OK):
        fail(f"--output-dir {args.output_dir}: no permission to write there")
    name = f" ({torch.cuda.get_device_name()})" if args.device == "cuda" else ""
    print(f"{args.script}, {args.variant}, seed {args.seed}")
    print(f"device  {args.device}{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    size = {name: getattr(args, name) for name in ("image_size", "channels") if name in args}
    data = load_data(args.dataset, args.data_dir, device=args.device, **size)
    args.dataset, args.classes = data.name, classes
    if len(data.samples) < args.batch_size:
        fail(f"--batch-size {args.batch_size} exceeds the {len(data.samples)} training samples")
    shape = list(data.samples.shape[1:])
    print(f"data    {data.name}, {len(data.samples)} samples of {shape}, batch {args.batch_size}")
    return data


class Run:
    """One training: its folder, epoch lines, log, pictures and checkpoints.

    plots: the panels of curves.png, as save_curves takes them.
    styles: further pictures to draw at the end, {name: function of the pipeline and a path}.
    state: every module and optimizer of the training by name, `generator` among them; samples are
        drawn from `average`, its moving average, where there is one.

        with Run(args, data, generate_noise, PLOTS, generator=..., critic=..., ...) as run:
            for batches in run.epochs():        # an endless stream of real batches per epoch
                for _ in run.steps():           # N // batch generator steps
                    run.record(step(...))       # quantities to average over the epoch

    Ctrl-C keeps a checkpoint (exit code 130); a quantity that is no longer finite ends the run (1).
    """

    def __init__(self, args, data, draw_noise, plots, styles=None, **state):
        self.args, self.data, self.plots, self.styles, self.state = args, data, plots, styles or {}, state
        self.epoch = self.step = 0  # how many are done
        self.history = []
        self.steps_per_epoch = min(len(data.samples) // args.batch_size, args.max_batches or sys.maxsize)
        self.folder = self._new_folder()
        self.samples = self.folder / "samples"
        self.samples.mkdir()
        self.pictures = []
        versions = {module.__name__: module.__version__ for module in (torch, torchvision, np, matplotlib)}
        options = {**vars(args), "threads": torch.get_num_threads(),
                   "versions": {"python": platform.python_version(), **versions}}
        (self.folder / "options.json").write_text(json.dumps(options, indent=2) + "\n")
        print(f"output  {self.folder}: {args.epochs} epochs of {self.steps_per_epoch} generator steps", flush=True)

        self.pipeline = Pipeline(state.get("average", state["generator"]), draw_noise, args)
        points = data.samples.dim() == 2
        self.latents = self.pipeline.latents(2500 if points else 8 * (args.classes or 8))  # fixed for the whole run
        self.final_latents = self.pipeline.latents(2500 if points else 16 * (args.classes or 16))
        self._save_real(len(self.latents[0]))

    def _new_folder(self):
        name = f"{self.args.script}-{self.args.dataset}-"
        parent = Path(self.args.output_dir)
        taken = [path.name.removeprefix(name) for path in parent.glob(f"{name}*")]
        for number in itertools.count(1 + max((int(text) for text in taken if text.isdigit()), default=0)):
            with contextlib.suppress(FileExistsError):  # another run took it in between
                folder = parent / f"{name}{number:04d}"
                folder.mkdir()
                return folder

    def _save_real(self, count):
        index = torch.arange(count) * len(self.data.samples) // count  # evenly: folders come class by class
        if self.args.classes:
            index = torch.cat([(self.data.labels == label).nonzero()[:count // self.args.classes, 0].cpu()
                               for label in range(self.args.classes)])
        columns = count // self.args.classes if self.args.classes else math.ceil(math.sqrt(count))
        save_picture(self.data.scaled(index.to(self.data.samples.device)).cpu(), columns, self.samples / "real.png")

    def __enter__(self):
        self._picture()
        self.bar = tqdm(total=self.args.epochs * self.steps_per_epoch, unit="step",
                        disable=None, leave=False, dynamic_ncols=True)  # disable=None: shown on terminals only
        return self

    def epochs(self):
        """One endless stream of (real, labels) batches per epoch; log, pictures and checkpoints in between."""
        while self.epoch < self.args.epochs:
            self.sums, self.notes, start = {}, {}, time.perf_counter()
            yield self.data.batches(self.args.batch_size)
            row = {name: (total / count).item() for name, (total, count) in self.sums.items()}  # waits for the device
            self.epoch += 1
            self._log(row, time.perf_counter() - start)
            last = self.epoch == self.args.epochs
            if last or self.epoch % self.args.sample_interval == 0:
                self._picture()
                save_curves(self.history, self.plots, self.folder / "curves.png")
            if last or self.epoch % self.args.checkpoint_interval == 0:
                self.save_checkpoint()

    def steps(self):
        """Counts the generator steps of one epoch."""
        for _ in range(self.steps_per_epoch):
            yield
            self.step += 1
            self.bar.update()

    def record(self, quantities):
        """Add 0-d tensors by name to this epoch's means; they stay on the device until the epoch ends."""
        for name, value in quantities.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = total + value.detach(), count + 1

    def note(self, name, content):
        """Add what JSON can hold to this epoch's line of log.jsonl; the epoch line does not show it."""
        self.notes[name] = content

    def _log(self, row, seconds):
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if not bad:
            position = {"epoch": self.epoch, "step": self.step, "seconds": round(seconds, 3)}
            self.history.append({**position, **row, **self.notes})
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(self.history[-1]) + "\n")
        width = len(str(self.args.epochs))
        values = "  ".join(f"{name} {value:9.4f}" for name, value in row.items())
        tqdm.write(f"epoch {self.epoch:{width}d}/{self.args.epochs}  {values}  {seconds:7.2f} s")
        sys.stdout.flush()
        if bad:
            self.bar.close()
            fail(f"{bad[0]} is no longer finite in epoch {self.epoch}; try smaller --lr-g and --lr-d "
                 f"(output so far in {self.folder})", code=1)

    def _picture(self):
        self.pictures.append(self.samples / f"epoch_{self.epoch:04d}.png")
        self.pipeline.generate(*self.latents, self.pictures[-1])

    def save_checkpoint(self):
        """Write checkpoint.pt whole or not at all: options, position and all states."""
        content = {"options": vars(self.args), "epoch": self.epoch, "step": self.step,
                   **{name: part.state_dict() for name, part in self.state.items()}}
        torch.save(content, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")

    def __exit__(self, kind, error, traceback):
        self.bar.close()
        if kind is KeyboardInterrupt:
            self.save_checkpoint()
            if self.history:
                save_curves(self.history, self.plots, self.folder / "curves.png")
            print(f"interrupted after {self.epoch} epochs; checkpoint.pt and curves.png are in {self.folder}")
            raise SystemExit(130)
        if kind is None:
            self.pipeline.generate(*self.final_latents, self.samples / "final.png")
            self.pipeline.interpolate(self.samples / "interpolation.png")
            dimensions = range(min(self.pipeline.rows, self.args.latent_dim))
            self.pipeline.explore(dimensions, self.samples / "latent_walk.png", one_base=True)
            for name, draw in self.styles.items():
                draw(self.pipeline, path=self.samples / f"{name}.png")
            save_film(self.pictures, self.samples / "progress.gif")
            print(f"done    look at {self.samples / 'final.png'} and {self.folder / 'curves.png'}")
            print(f"more    python {self.args.script}.py --from {shlex.quote(str(self.folder))}")
