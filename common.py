"""Plumbing of the numbered scripts: everything that is the same in all of them.

1  Command line    flags, their checks, the options of a run; what answers for whatever ends a script
2  Run             the folder, the epoch line, the log and the checkpoints of one training; resuming, drawing from them
3  Pipeline        the text's image-generation pipeline (実装例8, 3.6) around one generator
4  Data            real MNIST, digits drawn from fonts, the Gaussians of 実装例3; batches
5  Scores          what a generator has learned, in numbers (3.2, 3.6, 演習問題2 and 5)
6  Pictures        image grids, scatter plots, curves, the film of a training

No network, loss or training step of a GAN is in this file. Beside the text stand section 3, MIXTURES of section 4,
and section 5.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import gzip
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import select
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

if Path(sys.argv[0]).name[:1] == "0" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # in a script: no traceback for Ctrl-C while torch is imported

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed, nn
from tqdm import tqdm

from csrc import build, ops
from csrc.ops import fused  # noqa: F401  for the scripts

# torchvision and matplotlib take longer to import than --help may: they are imported where they are used.

# Under torchrun this process is one of RANKS that train together, each on its share of the data and of the batch.
# The first, rank 0, speaks and writes for all.
RANKS = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
RANK = int(os.environ.get("RANK", "0")) if RANKS > 1 else 0

# ---------------------------------------------------------------------------------------------
# 1  Command line
# ---------------------------------------------------------------------------------------------

DEFAULTS = dict(seed=0, device="auto", dataset="auto", data_dir="data", output_dir="runs", channels=1,
                ema_decay=0, lr_decay=0, eval_interval=None, sample_interval=None, max_batches=None, run=None,
                resume=None, classes=0)
GROUPS = {"training": "training", "data": "data", "output": "output and scores", "kernels": "fused kernels",
          "drawing": "drawing from a run, with --from"}


def fail(message, code=2):
    """Print one line on stderr and exit; exit code 2 means bad input."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


class Output(io.FileIO):
    """A standard stream whose reader may go, or whose disk may fill: the training goes on without it."""

    def write(self, data):
        with contextlib.suppress(OSError):
            while (count := super().write(data)) is None:  # a full pipe whose other users want no waiting
                select.select([], [self], [])
            return count
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if self.fileno() == 1:
            print(f"{Path(sys.argv[0]).name}: what it prints can no longer be written; it goes on", file=sys.stderr)
        return len(data)


def guarded(main):
    """Run a script's main; the one place that answers for whatever ends it, in one line.

    Exit codes: 1 for what fails in mid-run, 2 for bad input, 128 + its number for a signal.
    """
    while os.open(os.devnull, os.O_RDWR) < 2:  # a standard stream is closed: the next file would take its place
        pass
    sys.stdout, sys.stderr = (  # "replace": "?" for what a terminal's encoding lacks
        io.TextIOWrapper(io.BufferedWriter(Output(number, "w", closefd=False)), getattr(stream, "encoding", None),
                         "replace", line_buffering=True) for number, stream in ((1, sys.stdout), (2, sys.stderr)))
    signals = [number for number in signal.valid_signals()
               if getattr(number, "name", "") in ("SIGINT", "SIGTERM", "SIGHUP")
               and signal.getsignal(number) == signal.SIG_DFL]  # else ignored, as by nohup
    for number in signals:
        signal.signal(number, interrupt)
    try:
        limit_memory()
        main()
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + (*error.args, signal.SIGINT)[0]) from None
    except Exception as error:  # noqa: BLE001
        if out_of_memory(error):
            size = re.search(r"allocate (\d[\d.]* \w+)", str(error))
            given = [text.partition("=")[0] for text in sys.argv if text.partition("=")[0] in LARGE]
            fail(f"there is too little memory{f' for another {size[1]}' if size else ''}; "
                 f"lower {' or '.join(given or ['--batch-size'])}", 1 if Run.current and Run.current.step else 2)
        if RANKS > 1 and isinstance(error, RuntimeError):  # it lost another one, most often, which says why
            fail(f"process {RANK} of {RANKS} stopped: {str(error).partition(chr(10))[0]}", code=1)
        traceback.print_exc()
        fail("this is a fault of these scripts; please report the lines above, with the command "
             f"{shlex.join(['python', *sys.argv])}", code=1)
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)


LARGE = ("--batch-size", "--latent-dim", "--width", "--image-size", "--generate")  # what takes memory


def interrupt(number, frame):
    """Handles signals: a training ends where stop_if_asked says, anything else now; the same again ends at once."""
    signal.signal(number, signal.SIG_DFL)
    if Run.current and Run.current.training:
        Run.current.signal = number
    else:
        raise KeyboardInterrupt(number)


def stop_if_asked():
    """End a training that a signal has asked to end; called where nothing is half done."""
    if Run.current and Run.current.training and Run.current.signal:
        raise KeyboardInterrupt(Run.current.signal)


def out_of_memory(error):
    """Whether that is what an exception says; torch raises a plain RuntimeError on the CPU."""
    said = re.search("(cannot|can't|tried to) allocate", str(error), re.IGNORECASE)
    return bool(said) or isinstance(error, MemoryError | torch.OutOfMemoryError)


def limit_memory():
    """Let the system refuse memory that is not free: an error here, where its killer would end the process mute."""
    with contextlib.suppress(ImportError, OSError, ValueError, StopIteration, OverflowError, TypeError):  # not known
        import resource  # not on Windows

        with open("/proc/self/status") as file:
            used = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
        if not torch.cuda.is_available():  # CUDA takes addresses without end
            limit = resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (used + free_memory() // RANKS, limit))


@contextlib.contextmanager
def written(path, code=1):
    """A block that writes `path`: if that fails, one line says why."""
    try:
        yield
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror})", code)


def number(kind, at_least=-math.inf, above=-math.inf, below=math.inf, at_most=math.inf):
    """An argparse type: an int or a finite float within the given bounds."""
    limits = {"of at least": at_least, "above": above, "below": below, "at most": at_most}
    expected = " and ".join(f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit))

    def parse(text):
        with contextlib.suppress(ValueError):
            if at_least <= (value := kind(text)) <= at_most and above < value < below:
                return value
        name = {int: "whole number", float: "number"}[kind]
        raise argparse.ArgumentTypeError(f"expected a {name} {expected}, got {text!r}")
    return parse


COUNT = dict(type=number(int, at_least=1), metavar="N")
SIZE = dict(type=number(int, at_least=1, below=100_000), metavar="N")  # what becomes a tensor at once
RATE = dict(type=number(float, above=0, below=1000), metavar="X")
DECAY = dict(type=number(float, at_least=0, below=1), metavar="X")
SWITCH = dict(action="store_const", const=True)
FLAGS = {  # of every script: group, help, what argparse is told of its value
    "--output-dir": (None, "folder that receives the run's folder", dict(metavar="DIR")),
    "--from": (None, "draw from this trained run (folder or checkpoint)", dict(dest="run", metavar="RUN")),
    "--resume": (None, "go on with this interrupted run, by default the script's newest; --epochs may grow",
                 dict(nargs="?", const=True, metavar="RUN")),
    "--batch-size": ("training", "samples per step", dict(type=number(int, at_least=2), metavar="N")),  # for BatchNorm
    "--lr-g": ("training", "Adam's learning rate, generator", RATE),
    "--lr-d": ("training", "Adam's learning rate, discriminator or critic", RATE),
    "--beta1": ("training", "Adam's first beta", DECAY),
    "--lr-decay": ("training", "share of the training, at its end, in which the learning rates fall to 0",
                   dict(type=number(float, at_least=0, at_most=1), metavar="X")),
    "--latent-dim": ("training", "numbers in one latent vector z", SIZE),
    "--seed": ("training", "seed of all random numbers", dict(type=number(int, at_least=0, below=2**32), metavar="N")),
    "--device": ("training", "where to compute", dict(choices=["auto", "cpu", "cuda", "mps"])),
    "--max-batches": ("data", "at most N generator steps per epoch, for a quick look", COUNT),
    "--sample-interval": ("output", "epochs between sample pictures (default: a twentieth of the run)", COUNT),
    "--eval-interval": ("output", ("epochs between scores; mnist, fashion-mnist and digits then hold out every sixth "
                                   "training image to choose best.pt. 0: no scores (default: scores at the end)"),
                        dict(type=number(int, at_least=0), metavar="N")),
    "--ema-decay": ("output", "sample from a moving average of the generator, which keeps this much per step", DECAY),
    "--evaluate": ("drawing", "score it", SWITCH),
    "--generate": ("drawing", "a picture of N samples, of several classes in whole rows (default: 64)", SIZE),
    "--interpolate": ("drawing", "paths between latent vectors", SWITCH),
    "--explore": ("drawing", "move latent dimension DIM by -3 to 3", dict(type=number(int, at_least=0), metavar="DIM")),
}


def fits(action, value):
    """Whether a value from a checkpoint is one that its flag could have given."""
    with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
        parsed = (action.type or str)(str(value))
        return parsed == value and (not action.choices or parsed in action.choices)


class Parser(argparse.ArgumentParser):
    """The command line of one numbered script.

    description: the script's docstring. constants: its table, a row of option values per variant. The option
    "variant" picks the row, by default the first; data sets of points have the row "points". Every flag that is not
    given takes the value of its row, so the table is the only place of defaults. `given` is then the set of the
    flags that were given.

    image_sizes: what --image-size offers in a script whose networks come in several sizes; such a script also has
    --channels and takes images of your own, --dataset folder.
    kernels: which part of the script has fused kernels, and with it --kernels: "critic", which only a training uses,
    or "generator", which --from uses too.
    """

    def __init__(self, script, description, constants, image_sizes=(), kernels=None):
        summary, _, details = (description or "").partition("\n")  # python -OO leaves out docstrings
        super().__init__(prog=Path(script).name, usage="python %(prog)s [flags]", description=summary, epilog=details,
                         allow_abbrev=False,
                         formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30))
        self.constants, self.kernels, self.drawing = constants, kernels, set()
        self.defaults = {**DEFAULTS, "kernels": "auto"} if kernels else DEFAULTS
        self.groups = {name: self.add_argument_group(title) for name, title in GROUPS.items()
                       if name != "kernels" or kernels}
        datasets = ["auto", *CLASSIFIED, *["folder"] * bool(image_sizes), *(MIXTURES if "points" in constants else ())]
        self.option("--epochs", "rounds of (samples // batch size) generator steps", None, **COUNT)
        self.option("--dataset", "auto: MNIST if it is there or can be downloaded, else digits", None, choices=datasets)
        self.option("--data-dir", "folder that holds, or receives, MNIST/raw" +
                    "; with --dataset folder your images" * bool(image_sizes), None, metavar="DIR")
        for flag, (group, text, settings) in FLAGS.items():
            self.option(flag, text, group, **settings)
        if image_sizes:
            self.option("--image-size", "height and width in pixels", "data", type=int, choices=image_sizes)
            self.option("--channels", "1: grey, 3: colour", "data", type=int, choices=(1, 3))
        if kernels:
            self.option("--kernels", "fused ones from csrc/, or PyTorch's own operations (reference); auto: fused "
                        "where they can be compiled", "kernels", choices=["auto", "fused", "reference"])

    def option(self, flag, help, group="training", **settings):
        """Add a flag to a group of GROUPS; its help shows the default, or that of each row of the table."""
        name = flag.strip("-").replace("-", "_")
        values = {row: {**self.defaults, **table}.get(name) for row, table in self.constants.items()}
        default = ", ".join(f"{row} {value}" for row, value in values.items())
        if len(set(values.values())) == 1:
            default = next(iter(values.values()))
        action = self.groups.get(group, self).add_argument(
            flag, help=help if default is None else f"{help} (default: {default})", **settings)
        if group == "drawing":
            self.drawing.add(action.dest)

    def error(self, message):
        fail(message)

    def options(self, argv=None):
        """All options of this call as a Namespace, complete and checked; with --from, those of that run."""
        given = {name: value for name, value in vars(self.parse_args(argv)).items() if value is not None}
        self.given = set(given)
        if RANKS > 1 and given.keys() & {"run", "compare_kernels"}:
            fail("torchrun is for trainings; start this with python")
        if {"run", "resume"} <= self.given:
            fail("--from draws and --resume trains; give one of them")
        if "run" in given:
            return argparse.Namespace(**self._options_of_run(given))
        for name in sorted(self.drawing & self.given):
            fail(f"{self._flag(name)} needs a trained generator: name its run with --from RUN")
        if "resume" in given:
            return argparse.Namespace(**self._options_to_resume(given))
        dataset = given.get("dataset")
        if dataset in MIXTURES and "variant" in given:
            fail(f"{self._flag('variant')} {given['variant']} is for images; --dataset {dataset} has its own networks")
        if "compare_kernels" in given and given.setdefault("kernels", "fused") != "fused":
            fail("--compare-kernels compares fused kernels with the reference; leave out --kernels")
        row = given.setdefault("variant", "points" if dataset in MIXTURES else next(iter(self.constants)))
        options = {"script": Path(self.prog).stem, **self.defaults, **self.constants[row], **given}
        return argparse.Namespace(**options)

    def _read(self, flag, path):
        """The checked options in the checkpoint at `path`, a file or a run's folder, and its path."""
        path = Path(path, "checkpoint.pt") if os.path.isdir(path) else Path(path)
        if not os.path.isfile(path):
            fail(f"{flag}: {path} does not exist")
        try:
            options = load_checkpoint(path)["options"]
            script = options["script"]
        except Exception as error:  # whatever a damaged or foreign file raises
            if out_of_memory(error):
                raise
            fail(f"{flag}: {path} is not a checkpoint of these scripts, or damaged ({type(error).__name__})")
        if script != Path(self.prog).stem:
            fail(f"{flag}: {path} was trained by {script}.py; give it to that script")
        table, wrong = self.constants.get(str(options.get("variant"))), ["variant"]
        if table:
            usual = {**self.defaults, **table}
            options = {**usual, **options}  # an older one may lack new flags
            flags = {action.dest: action for action in self._actions if action.dest != "variant"}
            wrong = [name for name, value in options.items() if not isinstance(name, str) or
                     not isinstance(value, str | int | float | None) or
                     value is None and usual.get(name) is not None or
                     name in {"classes", *table} - flags.keys() and value != usual[name] or
                     name in flags and value is not None and not fits(flags[name], value)]
        if wrong:
            fail(f"{flag}: {path} has options that this script cannot have ({', '.join(map(str, wrong))}); "
                 "it is damaged, or of an older version")
        return options, path

    def _options_to_resume(self, given):
        folder, script = Path(given.get("output_dir", DEFAULTS["output_dir"])), Path(self.prog).stem
        found = sorted(folder.glob(f"{script}-*/checkpoint.pt"), key=os.path.getmtime)
        named = given.pop("resume")
        if named is not True and "output_dir" in given:
            fail("--resume RUN goes on in the folder of that run; leave out --output-dir")
        if named is True and not found:
            fail(f"--resume: there is no run of {script} in {folder}: name it, or say where it lies with --output-dir")
        options, path = self._read("--resume", found[-1] if named is True else named)
        if "digest" not in options:
            fail(f"--resume: {path} is of an older version, which cannot go on")
        here = {**given, "threads": torch.get_num_threads(), "ranks": RANKS}
        for name, value in here.items():
            if options.get(name) != value != "auto" and name not in ("epochs", "output_dir", "data_dir"):
                advice = {"threads": f"; set OMP_NUM_THREADS={options.get(name)}",
                          "ranks": f"; torchrun --nproc-per-node {options.get(name)} starts as many processes"}
                fail(f"--resume: {name if name in advice else self._flag(name)} {value} is not the run's, which has "
                     f"{options.get(name)}: a run goes on as it was{advice.get(name, '')}")
        if given.get("epochs", options["epochs"]) < options["epochs"]:
            fail(f"--resume: --epochs {given['epochs']} is less than the run's {options['epochs']}")
        moved = {name: given[name] for name in ("epochs", "data_dir") if name in given}
        return {**options, **moved, "output_dir": str(path.parent.parent), "run": None, "resume": str(path)}

    def _options_of_run(self, given):
        options, path = self._read("--from", given.pop("run"))
        latent_dim = options["latent_dim"]
        if given.get("dataset") == "auto":
            del given["dataset"]
        allowed = {"seed", "device", *self.drawing, *["data_dir"] * ("evaluate" in given),
                   *["kernels"] * (self.kernels == "generator")}
        for name, value in given.items():
            if name not in allowed and options.get(name) != value:
                fail(f"{self._flag(name)} {value} contradicts the run, which has {options.get(name)}; "
                     "--from trains nothing")
        if given.get("explore", 0) >= latent_dim:
            fail(f"--explore {given['explore']}: the run's latent dimensions are 0 to {latent_dim - 1}")
        wanted = given.keys() & self.drawing
        if wanted <= {"label"} or wanted == {"label", "evaluate"}:
            given["generate"] = 64
        options |= {**dict.fromkeys(self.drawing | {"label", "styles"}), "device": "auto", "kernels": "auto", **given}
        if self.kernels != "generator":
            del options["kernels"]  # none are used
        return options | {"run": str(path)}

    def _flag(self, name):
        return next(action.option_strings[0] for action in self._actions if action.dest == name)


# ---------------------------------------------------------------------------------------------
# 2  Run
# ---------------------------------------------------------------------------------------------

def prepare(args):
    """Before a training: seed, device and data, which it returns; completes `args` with what they turned out to be."""
    torch.manual_seed(args.seed)
    args.device = pick_device(args.device, "--resume: the run's --device" if args.resume else "--device")
    # The thread of the backward pass has no CUDA context at first; PyTorch sets one itself, and warns.
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
    if RANKS > 1:
        join_ranks(args)
    with written(f"--output-dir {args.output_dir}", code=2):
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_dir).close()
    name = f" ({torch.cuda.get_device_name()})" if args.device == "cuda" else ""
    print(f"{args.script}, {args.variant}, seed {args.seed}")
    print(f"device  {args.device}{name}, {torch.get_num_threads()} threads, torch {torch.__version__}" +
          f", {RANKS} processes" * (RANKS > 1))
    if RANK:  # after rank 0, which may have to download them
        distributed.barrier()
    data = load_data(args.dataset, args.data_dir, "train", args.device, getattr(args, "image_size", 28), args.channels)
    if RANKS > 1 and not RANK:
        distributed.barrier()
    args.dataset, args.threads, args.ranks = data.name, torch.get_num_threads(), RANKS
    digest = data.digest(args.classes)
    if largest_of_ranks(digest) != digest:
        fail("the processes have found different data")
    if args.resume and args.digest != digest:
        fail(f"--resume: the data of {data.name} are not those that the run was trained on")
    if args.resume and args.torch != torch.__version__:
        print(f"resume  trained with torch {args.torch} so far: what follows is not the same to the bit")
    args.digest, args.torch = digest, str(torch.__version__)  # its own type is no plain string
    if args.eval_interval and data.name in CLASSIFIED:
        data, held_out = hold_out(data)
        print(f"data    {len(held_out.samples)} training samples are held out to choose best.pt")
    if len(data.samples) < args.batch_size:
        fail(f"--batch-size {args.batch_size} exceeds the {len(data.samples)} training samples")
    shape = list(data.samples.shape[1:])
    print(f"data    {data.name}, {len(data.samples)} samples of {shape}, batch {args.batch_size}")
    choose_kernels(args)
    args.batch_size //= RANKS  # from here on this process's own
    share = slice(RANK, len(data.samples) // RANKS * RANKS, RANKS)
    return Data(data.name, data.samples[share], data.labels[share])


def join_ranks(args):
    """Meet the other processes of torchrun; all but rank 0 fall silent."""
    if args.batch_size % RANKS or args.batch_size < 2 * RANKS:
        fail(f"--batch-size {args.batch_size} cannot be shared by {RANKS} processes; take a larger multiple of {RANKS}")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if args.device == "cuda" else "gloo",
                                   timeout=datetime.timedelta(hours=2))  # rank 0 draws and scores meanwhile
    if RANK:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def average_gradients(optimizer, *_):
    """Before each of the optimizer's steps: every gradient becomes its mean over the ranks."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / RANKS).split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


def pick_device(wanted, flag="--device"):
    """The device that `wanted` (auto, cpu, cuda or mps) stands for on this machine."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name, here in usable.items() if here) if wanted == "auto" else wanted
    if not usable[device]:
        fail(f"{flag} {wanted}: this torch ({torch.__version__}) finds no such device here")
    return device


def choose_kernels(args):
    """Choose the kernels of `fused` formulas as --kernels says, and say what it came to; nothing in scripts without.

    Exits with code 2 where --kernels fused cannot be had.
    """
    if "kernels" in args:
        try:
            print(f"kernels {ops.choose(args.kernels, args.device)}")
        except build.Unavailable as reason:
            fail(f"no fused kernels: {reason}")
        args.kernels = "fused" if ops.KERNELS else "reference"  # for options.json


def compare_kernels(args, formula, step):
    """--compare-kernels: a table of the kernel that serves `formula`, and a file of it in the output folder.

    formula: the script's function under @fused; step: one training step. Exits with code 1 where a kernel is wrong.
    """
    from csrc.compare import compare  # slow to import

    path = Path(args.output_dir, f"{args.script}-kernels.json")
    table = {name: getattr(args, name) for name in ("script", "variant", "dataset", "batch_size")}
    for line in compare(formula, step, args.device, free_memory(), table):
        print(line, flush=True)
    write_whole(path, json.dumps(table, indent=1) + "\n")
    print(f"saved   {path}")
    if not all("fused" in row["seconds"] for row in table["rows"]):
        fail("a fused kernel is wrong", code=1)


class Dropout(nn.Module):
    """nn.Dropout(0.5); on the CPU its masks come from random bytes, one bit of each, in an eighth of the time."""

    def forward(self, x):
        return x * self.mask(x) if self.training and x.device.type == "cpu" else F.dropout(x, 0.5, self.training)

    def mask(self, x):
        """What multiplies x: 0 or 2, each with probability 0.5; 1 in eval mode."""
        if not self.training or x.device.type != "cpu":
            return F.dropout(torch.ones_like(x), 0.5, self.training)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_()  # random but for the highest bit
        return (words.view(torch.uint8)[:x.numel()] & 2).view(x.shape).to(x.dtype)


@torch.no_grad()
def update_average(average, generator, decay, step):
    """The mean of the generators after steps 1 to `step`, each weighing `decay` of the next; buffers included.

    ProGAN's average (arXiv 1710.10196, appendix A) without a share of the untrained generator, as Adam corrects its.
    """
    new, share = generator.state_dict(), (1 - decay) / (1 - decay**step)
    for name, value in itertools.chain(average.named_parameters(), average.named_buffers()):
        if value.is_floating_point():
            new[name] = torch.lerp(value, new[name], share)
    average.load_state_dict(new)  # counters and 06's level as they are


class Run:
    """One training: its folder, epoch lines, log, pictures, scores and checkpoints.

    plots: the panels of curves.png, as save_curves takes them.
    styles: further pictures to draw at the end, {name: function of the pipeline and a path}.
    state: every module and optimizer of the training by name, `generator` among them. With --ema-decay
        its moving average is added as `average`; that one is sampled and scored.

        with Run(args, data, generate_noise, PLOTS, generator=..., critic=..., ...) as run:
            for batches in run.epochs():        # an endless stream of real batches per epoch
                for _ in run.steps():           # N // batch generator steps
                    run.record(step(...))       # quantities to average over the epoch

    Whatever ends it, the run can go on from its checkpoint (--resume) as if nothing had happened. There is one from
    the start, after the steps of each epoch, before its log, pictures and scores, at the end, and at least every
    SAVE_SECONDS. A signal ends the run after its step; a quantity or weight that is no longer finite ends it (1).
    """

    SAVE_SECONDS, CHECK_STEPS = 600, 100
    current = None  # the run in progress, for the handler of signals

    def __init__(self, args, data, draw_noise, plots, styles=None, **state):
        self.args, self.data, self.draw_noise = args, data, draw_noise
        self.plots, self.styles, self.state = plots, styles or {}, state
        self.step, self.history, self.scores = 0, [], {}  # steps done; rows of epochs; last scores of each checkpoint
        self.batches, self.training, self.signal, self.large = None, False, None, {}
        self.bar = self.lock = self.folder = None
        if args.ema_decay:
            state["average"] = copy.deepcopy(state["generator"])
        optimizers = [part for part in state.values() if isinstance(part, torch.optim.Optimizer)]
        self.rates = [(optimizer, [group["lr"] for group in optimizer.param_groups]) for optimizer in optimizers]
        self.steps_per_epoch = min(len(data.samples) // args.batch_size, args.max_batches or sys.maxsize)
        if RANKS > 1:  # all have the same weights; from here on each draws random numbers of its own
            if RANK:  # rank 0 goes on with the numbers that follow those of the weights
                torch.manual_seed((args.seed + RANK * 0x9E3779B9) % 2**32)
            for optimizer in optimizers:
                optimizer.register_step_pre_hook(average_gradients)
        self.scorer = make_scorer(args) if args.eval_interval != 0 and not RANK else None
        if self.scorer:
            when = f"every {args.eval_interval} epochs" if args.eval_interval else "at the end"
            print(f"scores  {when}, of {self.scorer.count} samples against {self.scorer.against}")
        elif args.eval_interval and not RANK:
            fail(f"--eval-interval: {NO_SCORES}")
        elif args.eval_interval is None:
            print(f"scores  none: {NO_SCORES}")

    @property
    def epoch(self):
        """How many epochs are in the log."""
        return len(self.history)

    def __enter__(self):
        Run.current, self.training = self, True
        return self

    def _begin(self):
        """The folder of a new run, or the place where a resumed one left off."""
        args = self.args
        self.folder = Path(args.resume).parent if args.resume else self._new_folder()
        self.samples = self.folder / "samples"
        self.pipeline = Pipeline(self.state.get("average", self.state["generator"]), self.draw_noise, args)
        points = self.data.samples.dim() == 2
        self.latents = self.pipeline.latents(2500 if points else 8 * (args.classes or 8))  # fixed for the whole run
        self.final_latents = self.pipeline.latents(2500 if points else 16 * (args.classes or 16))
        if not RANK:
            self.lock = only_here(self.folder)
            for left in [*self.folder.glob("*.*.[0-9]*.tmp"), *self.samples.glob("*.*.[0-9]*.tmp")]:
                with contextlib.suppress(OSError):  # half-written, by killed processes
                    left.unlink()
            self.samples.mkdir(exist_ok=True)
        if args.resume:
            self._restore()
        print(f"output  {self.folder}: {args.epochs} epochs of {self.steps_per_epoch} generator steps" +
              f", resumed after step {self.step}" * bool(args.resume), flush=True)
        if not RANK:
            versions = {name: importlib.metadata.version(name) for name in ("torchvision", "numpy", "matplotlib")}
            versions |= {"python": platform.python_version(), "torch": torch.__version__}
            options = {**self._options(), "versions": versions}
            write_whole(self.folder / "options.json", json.dumps(options, indent=2) + "\n")
            if not args.resume:
                self._save_real(len(self.latents[0]))
                self._picture()
        if not args.resume:
            self.save_checkpoint()
        stop_if_asked()
        self.bar = tqdm(total=args.epochs * self.steps_per_epoch, initial=self.step, unit="step",
                        disable=True if RANK else None, leave=False, dynamic_ncols=True)  # None: on terminals only
        self.step_saved, self.saved = self.step, time.perf_counter()

    def _new_folder(self):
        for number in itertools.count(1):
            folder = Path(self.args.output_dir, f"{self.args.script}-{self.args.dataset}-{number:04d}")
            if RANK:
                return folder
            with written(folder), contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder

    def _save_real(self, count):
        index = torch.arange(count) * len(self.data.samples) // count  # evenly: folders come class by class
        if self.args.classes:  # a row per class
            classes = range(self.args.classes)
            index = torch.cat([(self.data.labels == label).nonzero()[:8, 0].cpu() for label in classes])
        self.pipeline.save(self.data.scaled(index.to(self.data.samples.device)).cpu(), 8, self.samples / "real.png")

    def __exit__(self, kind, error, trace):
        self.training = False
        if self.lock is not None:
            os.close(self.lock)
        if self.bar is not None:
            self.bar.close()
        if kind and self.folder and not self.step and not self.args.resume and not RANK:  # nothing was trained
            shutil.rmtree(self.folder, ignore_errors=True)
        elif kind and issubclass(kind, KeyboardInterrupt):
            if not RANK and self.history:
                self._curves()
            print(f"interrupted after {self.epoch} epochs; to go on: {self._command('--resume')}", flush=True)
            raise SystemExit(128 + (*error.args, signal.SIGINT)[0])

    def epochs(self):
        """One endless stream of (real, labels) batches per epoch; log, pictures and scores in between."""
        self._begin()
        while self.epoch < self.args.epochs:
            if self.batches is None:  # else in mid-epoch, resumed
                self.sums, self.seconds, self.batches = {}, 0.0, self.data.batches(self.args.batch_size)
            self.notes, self.lap = {}, time.perf_counter()
            yield self.batches
            self._end_epoch()
            self.batches = None
        self.save_checkpoint()
        self.bar.close()
        if self.scorer:
            show_scores(self.scorer, self.scores)
        print(f"done    look at {self.samples / 'final.png'} and {self.folder / 'curves.png'}")
        print(f"more    {self._command('--from')}")

    def _command(self, flag):
        joined = [f"{flag}={self.folder}"] if str(self.folder).startswith("-") else [flag, str(self.folder)]
        started = Path(sys.argv[0])  # perhaps from another folder
        script = started if started.stem == self.args.script else f"{self.args.script}.py"
        start = ["torchrun", "--nproc-per-node", str(RANKS)] if RANKS > 1 and flag == "--resume" else ["python"]
        return shlex.join([*start, str(script), *joined])

    def _due(self, interval):
        return self.epoch == self.args.epochs or bool(interval) and self.epoch % interval == 0

    def steps(self):
        """Counts the generator steps of one epoch; sets the learning rates, updates the moving average."""
        while self.step < (self.epoch + 1) * self.steps_per_epoch:
            left = 1 - self.step / (self.args.epochs * self.steps_per_epoch)
            for optimizer, rates in self.rates:
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * min(1, left / self.args.lr_decay) if self.args.lr_decay else rate
            yield
            self.step += 1
            if "average" in self.state:
                update_average(self.state["average"], self.state["generator"], self.args.ema_decay, self.step)
            self.bar.update()
            if self.step % self.CHECK_STEPS == 0:
                self._check()
            wish = largest_of_ranks(2 if self.signal else time.perf_counter() - self.saved > self.SAVE_SECONDS)
            if wish:
                self.save_checkpoint()
            if wish == 2:
                raise KeyboardInterrupt(self.signal or signal.SIGTERM)
        self.save_checkpoint()

    def record(self, quantities):
        """Add 0-d tensors by name to this epoch's means; they stay on the device until the epoch ends."""
        for name, value in quantities.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = total + value.detach(), count + 1

    def note(self, name, content):
        """Add what JSON can hold to this epoch's line of log.jsonl; the epoch line does not show it."""
        self.notes[name] = content

    def _check(self):
        """Ends the run if anything is no longer finite; warns once of what grows beyond all sense."""
        means = {name: (total / count).item() for name, (total, count) in self.sums.items()}  # waits for the device
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        for name, part in self.state.items():
            states = part.state.values() if isinstance(part, torch.optim.Optimizer) else [part.state_dict()]
            if not all(value.isfinite().all() for state in states for value in state.values()):
                bad.append(f"the state of {name}")
        weights = [flag for flag in ("gp_weight", "r1_weight") if getattr(self.args, flag, 0) > 100]
        advice = f"try a smaller --{weights[0].replace('_', '-')}" if weights else "try smaller --lr-g and --lr-d"
        if largest_of_ranks(bool(bad)):
            self.bar.close()
            if RANK:
                raise SystemExit(1)
            fail(f"{bad[0] if bad else 'a number in another process'} is no longer finite "
                 f"in step {self.step}, epoch {self.epoch + 1}; {advice} "
                 f"(the last good checkpoint, of step {self.step_saved}, is in {self.folder})", code=1)
        for name, value in means.items():
            if 1e6 < self.large.get(name, 0) < abs(value):
                tqdm.write(f"warning {name} is {value:.3g} and growing in step {self.step}; {advice}")
                self.large[name] = math.inf  # once
            self.large[name] = max(abs(value), self.large.get(name, 0))

    def _end_epoch(self):
        """The steps of an epoch are done: its line, its row of the log, its pictures and scores."""
        self.seconds += time.perf_counter() - self.lap
        means = torch.stack([(total / count).to(self.args.device) for total, count in self.sums.values()])
        if RANKS > 1:
            distributed.all_reduce(means)
        row = dict(zip(self.sums, (means / RANKS).tolist()))
        self.history.append({"epoch": self.epoch + 1, "step": self.step, "seconds": round(self.seconds, 3),
                             **row, **self.notes})
        if RANK:
            return
        values = "  ".join(f"{name} {value:9.4f}" for name, value in row.items())
        epochs = self.args.epochs
        tqdm.write(f"epoch {self.epoch:{len(str(epochs))}d}/{epochs}  {values}  {self.seconds:7.2f} s")
        self._save_log()
        if self._due(self.args.sample_interval or max(1, self.args.epochs // 20)):
            self._picture()
            self._curves()
        if self.epoch == self.args.epochs:
            self._final_pictures()
        if self.scorer and self._due(self.args.eval_interval):
            self._score()

    def _save_log(self):
        write_whole(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.history))

    def _score(self):
        """Score the generator, add that to the epoch's row of the log, and keep the best generator."""
        self.scores["checkpoint.pt"] = scores = {"epoch": self.epoch, **self.scorer(self.pipeline)}
        self.history[-1] |= scores
        self._save_log()
        if self.epoch < self.args.epochs:  # else the table follows
            tqdm.write("scores  " + "  ".join(f"{name} {scores[name]:{SCORES[name][1]}}" for name in SCORES
                                              if scores.get(name) is not None))
        best = self.scores.get("best.pt", {"FD_held_out": math.inf})
        if scores.get("FD_held_out", math.inf) < best["FD_held_out"]:
            self.scores["best.pt"] = scores
            write_whole(self.folder / "best.pt", packed(self._content()))
        save_scores(self.scorer, self.args.seed, self.scores, self.folder / "metrics.json")
        self._curves()

    def _curves(self):
        """curves.png, with the scores once there are two of them."""
        plots = self.plots
        if self.scorer and sum(self.scorer.curves[0][1][0] in row for row in self.history) > 1:
            kind, floor = self.scorer.floor_name, self.scorer.floor
            plots = plots + [(title, names, {f"{name}, {kind}": floor[name] for name in names})
                             for title, names in self.scorer.curves]
        save_curves(self.history, plots, self.folder / "curves.png")

    def _picture(self):
        self.pipeline.generate(*self.latents, self.samples / f"epoch_{self.epoch:04d}.png")

    def _final_pictures(self):
        self.pipeline.generator.eval()  # its training is over; the styles are drawn by parts of it
        self.pipeline.generate(*self.final_latents, self.samples / "final.png")
        self.pipeline.interpolate(self.samples / "interpolation.png")
        dimensions = range(min(self.pipeline.rows, self.args.latent_dim))
        self.pipeline.explore(dimensions, self.samples / "latent_walk.png", one_base=True)
        for name, draw in self.styles.items():
            draw(self.pipeline, path=self.samples / f"{name}.png")
        save_film(self.samples, self.samples / "progress.gif")

    def _options(self):
        return {**vars(self.args), "batch_size": self.args.batch_size * RANKS}

    def _content(self):
        """What best.pt holds, and a checkpoint besides its place in the training."""
        return {"options": self._options(), "epoch": self.step // self.steps_per_epoch, "step": self.step,
                **{name: part.state_dict() for name, part in self.state.items()}}

    def save_checkpoint(self):
        """Write checkpoint.pt: options, all states, and the place in the training, which --resume goes on from."""
        if self.step:
            self._check()
        now = time.perf_counter()
        place = {"random": torch.get_rng_state(), "sums": {}, "seconds": 0.0, "order": None}
        if self.args.device != "cpu":
            place["random_device"] = torch.get_device_module(self.args.device).get_rng_state()
        if self.batches is not None:
            self.seconds += now - self.lap
            place |= {"sums": {name: (total.cpu(), count) for name, (total, count) in self.sums.items()},
                      "seconds": self.seconds, "order": self.batches.order.cpu(), "position": self.batches.position}
        places = [place]
        if RANKS > 1:
            places = [None] * RANKS if not RANK else None
            distributed.gather_object(place, places)
        if not RANK:
            content = {**self._content(), "places": places, "history": self.history, "scores": self.scores}
            with written(self.folder / "checkpoint.pt"):
                replace_file(self.folder / "checkpoint.pt", packed(content))
        self.step_saved, self.saved = self.step, time.perf_counter()
        self.lap = self.saved

    def _restore(self):
        """Go on from the checkpoint: every state as it was when it was written."""
        try:
            content = load_checkpoint(self.args.resume)
            for name, part in self.state.items():
                part.load_state_dict(content[name])
            self.step, self.history, self.scores = content["step"], content["history"], content["scores"]
            place = content["places"][RANK]
            torch.set_rng_state(place["random"])
            if "random_device" in place:
                torch.get_device_module(self.args.device).set_rng_state(place["random_device"])
            if place["order"] is not None and self.step > self.epoch * self.steps_per_epoch:
                device = self.args.device
                self.sums = {name: (total.to(device), count) for name, (total, count) in place["sums"].items()}
                self.seconds, self.batches = place["seconds"], self.data.batches(self.args.batch_size)
                self.batches.order, self.batches.position = place["order"].to(device), place["position"]
        except Exception as error:  # whatever a damaged file raises
            if out_of_memory(error):
                raise
            fail(f"--resume: {self.args.resume} has no whole place in a training: it is a best.pt, damaged, "
                 f"or of an older version ({type(error).__name__})")
        if self.epoch >= self.args.epochs:
            fail(f"--resume: {self.args.resume} is complete after {self.epoch} epochs; a larger --epochs trains on")


def largest_of_ranks(wish):
    """The largest of all ranks' numbers, so that they save and stop together."""
    if RANKS == 1:
        return wish
    wish = torch.tensor(wish, dtype=torch.float64, device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(wish, distributed.ReduceOp.MAX)
    return wish.item()


def only_here(folder):
    """A descriptor that holds the folder until it is closed; exits with code 2 where another process trains in it."""
    try:
        import fcntl  # not on Windows

        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        fail(f"another process is training in {folder}")
    except (ImportError, OSError) as error:  # a system, or a file system, without locks
        print(f"output  {folder} cannot be locked ({error}): start no second process in it")


def packed(content):
    """What torch.save would write, as bytes: a full disk is then an OSError of ours."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def load_checkpoint(path):
    """What torch.save wrote, on the CPU; raises whatever a damaged file leads to, a single flipped bit included."""
    with zipfile.ZipFile(path) as file:
        if file.testzip():  # the checksums, at which torch.load does not look
            raise zipfile.BadZipFile
    return torch.load(path, map_location="cpu", weights_only=True)


def write_whole(path, content):
    """Write a file, text or bytes, whole or not at all; exits with code 1 where that fails."""
    with written(path):
        replace_file(path, content)
    stop_if_asked()


def replace_file(path, content):
    """Written aside, flushed to the disk, renamed: whenever the power fails, `path` is the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sample_run(make_generator, shape, draw_noise, args, styles=None):
    """--from: load the run's generator, score it, write the pictures that were asked for into its samples/.

    make_generator(*shape): the run's generator. styles: what --styles draws, {name: function(pipeline, path)}.
    """
    args.device = pick_device(args.device)
    run = Path(args.run)
    with torch.device("meta"):  # takes no memory: the weights come with the checkpoint
        generator = make_generator(*shape).eval()
    load_generator(generator, run, args.device)
    choose_kernels(args)
    pipeline = Pipeline(generator, draw_noise, args)
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
    if args.evaluate:  # before the pictures: it may refuse
        evaluate_run(pipeline, run)
    for name, draw in wishes.items():
        label = "" if args.label is None else f"-class{args.label}"
        file = "" if run.name == "checkpoint.pt" else f"-{run.stem}"
        path = run.parent / "samples" / f"{name}{label}-seed{args.seed}{file}.png"
        with written(path, code=2):
            path.parent.mkdir(exist_ok=True)
        draw(path=path)
        print(path)


def load_generator(generator, path, device):
    """Give the generator the state in a checkpoint, of its moving average if there is one; return the epoch."""
    try:
        checkpoint = load_checkpoint(path)
        state, expected = checkpoint.get("average", checkpoint["generator"]), generator.state_dict()
        if any(value.dtype != expected[name].dtype or not value.isfinite().all() for name, value in state.items()):
            raise ValueError
        # assign: the memory layout, too, so that the pictures are the training's to the bit
        generator.load_state_dict({name: value.to(device) for name, value in state.items()}, assign=True)
        return int(checkpoint["epoch"])
    except Exception as error:  # whatever a damaged file raises
        if out_of_memory(error):
            raise
        fail(f"--from: the generator in {path} does not fit its own options, or has weights that are no finite "
             "numbers; the file is damaged, or of an older version")


def evaluate_run(pipeline, path):
    """--evaluate: score a checkpoint, and with checkpoint.pt the best.pt beside it; writes metrics.json."""
    whole = path.name == "checkpoint.pt"
    files = [path] + [path.with_name("best.pt")] * (whole and path.with_name("best.pt").exists())
    for file in files:  # a damaged one is refused before the work begins
        load_generator(pipeline.generator, file, pipeline.device)
    args = pipeline.args
    scorer = make_scorer(args)
    if not scorer:
        fail(f"--evaluate: {NO_SCORES}")
    if args.dataset in MIXTURES and getattr(args, "digest", None) != load_data(args.dataset, args.data_dir).digest():
        fail(f"--evaluate: {args.dataset} is not what the run was trained on: {path} is of an older version")
    scores = {file.name: {"epoch": load_generator(pipeline.generator, file, pipeline.device), **scorer(pipeline)}
              for file in files}
    show_scores(scorer, scores)
    target = path.with_name("metrics.json" if whole else f"metrics-{path.stem}.json")
    save_scores(scorer, pipeline.args.seed, scores, target)
    print(target)


# ---------------------------------------------------------------------------------------------
# 3  Pipeline
# ---------------------------------------------------------------------------------------------

class Pipeline:
    """The text's image-generation pipeline (実装例8, 3.6): generate, interpolate, explore, save.

    generator: z [N, latent_dim] (and labels [N] if the options count `classes`) -> samples.
    draw_noise(count, args, device, generator): the script's latent distribution.
    Each picture's latents are drawn by a generator of its own: the same --seed gives the same
    picture, and the random numbers of a training are left alone (erratum 59). They are not those that a
    training with this seed begins with, either: its weights would be made of the same numbers.
    """

    ROWS, STEPS = 8, 10  # rows of an interpolation or a walk, pictures in a row
    OTHER = 0x5EED5EED  # turns a seed into another one

    def __init__(self, generator, draw_noise, args):
        self.generator, self.args, self.device = generator, args, next(generator.parameters()).device
        self.rows = args.classes or self.ROWS
        points = {"reach": MIXTURES[args.dataset][0].max().item() + 0.5} if args.dataset in MIXTURES else {}
        self.save = functools.partial(save_picture, **points)
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
        """z and labels for `count` samples; a conditional generator gets each z under every class, or `label`.

        Class by class, and with as many z as it takes: `count` is rounded up to a multiple of the classes.
        """
        classes = self.args.classes
        if classes and label is None:
            columns = math.ceil(count / classes)
            return self.noise(columns).repeat(classes, 1), torch.arange(classes).repeat_interleave(columns)
        return self.noise(count), torch.full((count,), label or 0)

    def generate(self, z, labels, path):
        """A grid of samples; with several classes one row per class, one column per z."""
        columns = (labels == 0).sum().item() if len(labels.unique()) > 1 else math.ceil(math.sqrt(len(z)))
        self.save(self(z, labels), columns, path)

    def interpolate(self, path, label=None):
        """Each row goes from one latent vector to another in a straight line, (1 - t) z1 + t z2 (erratum 61)."""
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
        self.save(samples, self.STEPS, path, paths=True)


# ---------------------------------------------------------------------------------------------
# 4  Data
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
        return chosen.float().div_(127.5).sub_(1) if chosen.dtype == torch.uint8 else chosen

    def digest(self, classes=0):
        """A checksum by which a run knows its data again; of the labels, too, where there are classes."""
        digest = zlib.crc32(self.samples.cpu().numpy())
        return zlib.crc32(self.labels.cpu().numpy(), digest) if classes else digest

    def batches(self, batch_size):
        """Endless (samples, labels) batches; shuffled anew when fewer than a batch are left."""
        return Batches(self, batch_size)


class Batches:
    """An iterator whose place, `order` and `position`, a checkpoint can hold."""

    def __init__(self, data, size):
        self.data, self.size = data, size
        self.order, self.position = torch.empty(0, dtype=torch.long, device=data.samples.device), 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.position + self.size > len(self.order):
            self.order, self.position = torch.randperm(len(self.data.samples), device=self.order.device), 0
        index = self.order[self.position:self.position + self.size]
        self.position += self.size
        return self.data.scaled(index), self.data.labels[index]


def load_data(name, data_dir, split="train", device="cpu", image_size=28, channels=1):
    """The data set `name` (see --dataset), its "train" or "test" split, as Data on `device`.

    Exits with code 2 when a data set named explicitly is neither present nor downloadable, when its folder or a file
    of it cannot be read, and when it does not fit into memory. Only "auto" may end up with other data, and says so.
    """
    if name in ("auto", "mnist", "fashion-mnist"):
        from torchvision import datasets
        kind = datasets.FashionMNIST if name == "fashion-mnist" else datasets.MNIST
        folder = Path(data_dir, kind.__name__, "raw")
        try:
            files = os.listdir(folder)
        except FileNotFoundError:
            files = []
        except OSError as error:
            fail(f"--data-dir: {folder} cannot be read ({error.strerror}); name another folder")
        trouble = None if any("-ubyte" in file for file in files) else download(kind, Path(data_dir))
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
    if name in MIXTURES:
        samples, labels = draw_mixture(name, split)
    elif name == "folder":
        samples, labels = read_folder(data_dir, image_size, channels, device)
    elif (image_size, channels) != (28, 1):
        samples = enlarge(samples, image_size, channels, device)
    return Data(name, samples.to(device), labels.to(device))


def download(kind, data_dir):
    """Fetch a torchvision data set into `data_dir`; return what went wrong, or None."""
    def probe(mirror):
        with contextlib.suppress(Exception):  # whatever a server's answer leads to
            address = mirror + kind.resources[0][0]
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=3).close()
            answered.append(mirror)

    # Threads: looking up a name knows no time limit.
    threads = [threading.Thread(target=probe, args=(mirror,), daemon=True) for mirror in kind.mirrors]
    answered, end, raw = [], time.monotonic() + 3, Path(kind.__name__, "raw")
    for thread in threads:
        thread.start()
    while not answered and time.monotonic() < end and any(thread.is_alive() for thread in threads):
        time.sleep(0.02)
    if not answered:
        return f"it is not in {data_dir / raw} and no download server answered within 3 s"
    try:
        (data_dir / raw).mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(30)  # torchvision sets none: a stalled server would be waited for without end
        with tempfile.TemporaryDirectory(dir=data_dir) as folder:  # checked there, so that no part of it stays
            type(kind.__name__, (kind,), {"mirrors": answered[:1]})(folder, download=True)
            for path in Path(folder, raw).glob("*-ubyte"):
                os.replace(path, data_dir / raw / path.name)
    except (OSError, RuntimeError) as error:
        return f"the download failed ({' '.join(str(error).split())})"
    finally:
        socket.setdefaulttimeout(None)


def regular(path):
    """`path`; an OSError if it is a pipe or a device, from which reading may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("not a regular file")
    return path


def read_mnist(folder, prefix):
    """Images uint8 [N, 1, 28, 28] and labels int64 [N] from the two IDX files of one split, raw or .gz."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    found = []
    for name, read, size in [("images-idx3", read_image_file, 28 * 28), ("labels-idx1", read_label_file, 1)]:
        path = folder / f"{prefix}-{name}-ubyte"
        if not os.path.exists(path):
            path = path.with_name(f"{path.name}.gz")
        try:
            with (gzip.open if path.suffix == ".gz" else open)(regular(path), "rb") as file:
                content = file.read(60_000 * size + 17)  # a byte more than MNIST: a small .gz may hold any number
            with tempfile.TemporaryDirectory() as unpacked:
                plain = Path(unpacked, path.stem)
                with written(plain, code=2):
                    plain.write_bytes(content)
                found.append(read(plain))
        except Exception as error:  # whatever gzip and torchvision raise on a damaged file
            if out_of_memory(error):
                raise
            fail(f"{path} is missing, damaged or misnamed ({type(error).__name__}: {error}); mend it or fetch it again")
    images, labels = found
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max() > 9:
        fail(f"{folder}: its {prefix} files hold images {list(images.shape)} and labels {list(labels.shape)} "
             f"up to {labels.max()}, expected one label from 0 to 9 for each image of 28x28 pixels")
    return images[:, None], labels


FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSerif",
         "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol",
         "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10"]


def draw_glyphs():
    """The ten digits in every font, centred and blurred, [10, fonts, 1, 64, 64] in [0, 1]."""
    from matplotlib import get_data_path
    from torchvision.transforms.functional import gaussian_blur

    folder = Path(get_data_path(), "fonts", "ttf")
    glyphs = np.zeros((10, len(FONTS), 64, 64), np.float32)
    for column, font in enumerate(FONTS):
        face = ImageFont.truetype(str(folder / f"{font}.ttf"), 58)
        for digit in range(10):
            left, top, right, bottom = face.getbbox(str(digit))
            canvas = Image.new("L", (64, 64))
            corner = 32 - (left + right) / 2, 32 - (top + bottom) / 2
            ImageDraw.Draw(canvas).text(corner, str(digit), fill=255, font=face)
            glyphs[digit, column] = np.asarray(canvas)
    return gaussian_blur(torch.from_numpy(glyphs / 255), 7, 1.5)[:, :, None]


@functools.cache
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


MIXTURES = {  # data sets in the plane: centres [K, 2] and sigma of K equal Gaussians
    # 実装例3's (erratum 8), all halved: most coordinates lie in [-1, 1].
    "gaussians": (torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1], [2, 0], [-2, 0], [0, 2], [0, -2]]) / 2, 0.05),
    # PacGAN's (arXiv 1712.04086, 4.1), the grid at a quarter of its size: within [-1, 1], too.
    "ring": (torch.stack([torch.arange(8).mul(math.pi / 4).cos(), torch.arange(8).mul(math.pi / 4).sin()], 1), 0.01),
    "grid": (torch.cartesian_prod(torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 5)), 0.0125),
}


def draw_mixture(name, split):
    """実装例3: points [N, 2] of a mixture and the number of the centre of each [N]; PacGAN trains on 100,000."""
    count, seed = {"train": (60_000 if name == "gaussians" else 100_000, 1), "test": (10_000, 2)}[split]
    (centres, sigma), rng = MIXTURES[name], torch.Generator().manual_seed(seed)
    labels = torch.randint(len(centres), (count,), generator=rng)
    return centres[labels] + sigma * torch.randn(count, 2, generator=rng), labels


def hold_out(data):
    """(The rest, every sixth sample). No classifier trains on the latter; a GAN does unless it has --eval-interval."""
    held = torch.arange(len(data.samples), device=data.samples.device) % 6 == 5
    return (Data(data.name, data.samples[part], data.labels[part]) for part in (~held, held))


def enlarge(images, image_size, channels, device):
    """uint8 [N, 1, 28, 28] -> [N, channels, image_size, image_size]: a black margin up to 32, then bilinear."""
    check_memory(len(images), image_size, channels, device)
    large = torch.empty(len(images), channels, image_size, image_size, dtype=torch.uint8)
    for part in torch.arange(len(images)).split(1000):
        padded = F.pad(images[part], (2, 2, 2, 2) if image_size != 28 else (0, 0, 0, 0))
        large[part] = (padded if padded.size(3) == image_size else
                       F.interpolate(padded.float(), image_size, mode="bilinear").round().byte())
    return large


def read_folder(folder, image_size, channels, device):
    """All images below `folder`: uint8 [N, channels, image_size, image_size] and labels [N], all 0.

    The largest centred square of each is scaled to the size. What cannot be read is named and left out.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    errors = []  # of folders that cannot be listed
    paths = sorted(Path(parent, name) for parent, _, names in os.walk(folder, onerror=errors.append)
                   for name in names if name.lower().endswith(IMG_EXTENSIONS))
    unreadable = [error.filename for error in errors]
    if not paths:
        reason = f" ({errors[0].strerror})" if errors else ""
        fail(f"--dataset folder: no image ({' '.join(IMG_EXTENSIONS)}) in '{folder}'{reason}; "
             "name your folder with --data-dir")
    check_memory(len(paths), image_size, channels, device)
    images, kept = np.empty((len(paths), channels, image_size, image_size), np.uint8), 0
    for path in tqdm(paths, desc="reading", unit="image", disable=None, leave=False, dynamic_ncols=True):
        try:
            with Image.open(regular(path)) as image:
                images[kept] = square_pixels(ImageOps.exif_transpose(image), image_size, channels)
            kept += 1
        except Exception:  # noqa: BLE001  whatever Pillow raises on a damaged file
            unreadable.append(path)
    if unreadable:
        names = ", ".join(os.path.relpath(path, folder) for path in unreadable)
        print(f"data    {len(unreadable)} unreadable files left out: {names}")
    if not kept:
        fail(f"--dataset folder: none of the {len(paths)} images in {folder} can be read")
    return torch.from_numpy(images[:kept]), torch.zeros(kept, dtype=torch.long)


def square_pixels(image, image_size, channels):
    """The centred square of a Pillow image as uint8 [channels, image_size, image_size]; transparency becomes white.

    Raises ValueError for floats and numbers of more than 16 bits: which of them is white is not known.
    """
    if image.mode == "F" or image.mode == "I" and np.asarray(image).max() > 65535:
        raise ValueError("pixels of no known range")
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert({1: "L", 3: "RGB"}[channels])
    image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image_size, image_size, channels).transpose(2, 0, 1)


def check_memory(count, image_size, channels, device):
    """Exits with exit code 2 if so many images do not fit into the memory that is free on this machine."""
    need, free = count * channels * image_size**2, free_memory()
    if device == "cuda":
        free = min(free, torch.cuda.mem_get_info()[0])
    if need > free:
        fail(f"{count} images of {image_size}x{image_size} with {channels} channels take {need / 2**30:.1f} GiB "
             f"of memory, {free / 2**30:.1f} GiB are free; choose a smaller --image-size or fewer images")


def free_memory():
    """Bytes of main memory free for new data, infinite where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return math.inf


# ---------------------------------------------------------------------------------------------
# 5  Scores
# ---------------------------------------------------------------------------------------------

SCORES = {  # name in metrics.json and log.jsonl: title in the table, format, what is best
    "IS": ("Inception Score", ".3f", "high, at most 10"), "FD": ("Frechet distance", ".3f", "low"),
    "FD_held_out": ("  to held-out training images", ".3f", "low: chooses best.pt"),
    "precision": ("precision", ".3f", "high: samples look real (void if recall is near 0)"),
    "recall": ("recall", ".3f", "high: samples vary as the data do"),
    "classes": ("classes covered", "g", "10"), "modes": ("modes captured", "g", "all"),
    "high_quality": ("samples within 3 sigma", ".3f", "as the perfect sampler"),
    "KL": ("KL divergence of the shares", ".4f", "low"), "as_asked": ("classes as asked for", ".3f", "high"),
}
CLASSIFIED = ("mnist", "fashion-mnist", "digits")  # data sets of ten classes of grey 28x28 images
NO_SCORES = "images of your own have no test images and no classes to score samples with"
FEATURES = 64  # of the classifier
NEIGHBOURS = 3  # k of precision and recall (arXiv 1904.06991)


def finite(samples):
    """`samples`, or what was computed of them; exits with code 1 if a number of them is infinite or NaN."""
    if not samples.isfinite().all():
        fail("the generator's samples are not finite numbers: there is nothing to score", code=1)
    return samples


def inception_score(probabilities):
    """3.2, 3.6: exp(mean_i KL(p_i || mean of p)) of probabilities p [N, classes] (arXiv 1606.03498): 1 to classes.

    It falls when classes are lost or unclear, not when all images of a class are alike (erratum 48). What real
    images score depends on the classifier (erratum 47).
    """
    p = finite(probabilities).double()
    return torch.special.xlogy(p, p / p.mean(0).clamp(min=1e-300)).sum(1).mean().exp().item()


def frechet_distance(features, reference):
    """3.2, 3.6: ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) for features [N, D] and [M, D], N, M >= 2.

    arXiv 1706.08500; m and S: mean and covariance. It is the square of a distance, between the Gaussians fitted to
    the features (erratum 50).
    """
    (m1, s1), (m2, s2) = ((part.mean(0), part.T.cov()) for part in (finite(features).double(), reference.double()))
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # the eigenvalues of S1 S2 are those of root S2 root
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, ((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross).item())


def precision_recall(features, reference):
    """3.6, 演習問題5: precision and recall (arXiv 1904.06991) of features [N, D] and [M, D], N, M > NEIGHBOURS.

    A set's manifold is the union of balls around its members, each reaching to the NEIGHBOURS-th nearest other
    one. Precision: the share of the samples in the reference's; recall: of the reference in that of the samples.
    """
    def radii(members):  # the nearest of all members is the member itself
        return torch.cat([torch.cdist(part, members).topk(NEIGHBOURS + 1, largest=False).values[:, -1]
                          for part in members.split(500)])

    features, reference = finite(features).double(), reference.double()
    radius, inside, covered = radii(reference), 0, torch.zeros(len(reference), dtype=torch.bool)
    for part, own_radius in zip(features.split(500), radii(features).split(500)):
        distance = torch.cdist(part, reference)  # [500, M]
        inside += (distance <= radius).any(1).sum().item()
        covered |= (distance <= own_radius[:, None]).any(0)
    return inside / len(features), covered.double().mean().item()


def divergence(counts, shares):
    """KL(counts / their sum || shares) in nats, both [K]; None if nothing was counted, or what has no share."""
    p, shares = counts.double() / counts.sum(), torch.as_tensor(shares, dtype=torch.float64)
    value = (torch.special.xlogy(p, p) - torch.special.xlogy(p, shares)).sum().item()
    return value if math.isfinite(value) else None


def make_classifier():
    """The network that reads digits: images [N, 1, 28, 28] in [0, 1] -> 10 logits.

    The FEATURES numbers before its last layer stand in for Inception's 2,048, which know photographs, not digits.
    """
    def block(inputs, outputs, kernel, stride):
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        return convolution, nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(*block(1, 16, 5, 2), *block(16, 32, 3, 1), nn.MaxPool2d(2),
                         *block(32, 64, 3, 1), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(64 * 3 * 3, FEATURES), nn.ReLU(), nn.Linear(FEATURES, 10))


def train_classifier(images, labels):
    """make_classifier's network after three epochs of uint8 images [N, 1, 28, 28] and labels [N], in eval mode.

    It learns to read with up to half of the pixels erased: strokes of generated digits have holes and frayed edges,
    which do not hinder a person either.
    """
    epochs, batch = 3, 256
    torch.default_generator.manual_seed(0)  # the CPU's alone: a training on another device keeps its random numbers
    network = make_classifier()
    order = torch.cat([torch.randperm(len(images))[:len(images) // batch * batch] for _ in range(epochs)])
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=len(order) // batch)
    for index in tqdm(order.split(batch), desc="classifier", unit="step", disable=None, leave=False):
        down, right = torch.randint(3, (2,)).tolist()  # each batch is shifted by up to a pixel
        shifted = F.pad(images[index] / 255, (1, 1, 1, 1))[:, :, down:down + 28, right:right + 28]
        kept = torch.rand_like(shifted) > torch.rand(batch, 1, 1, 1) / 2
        loss = F.cross_entropy(network(shifted * kept), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        stop_if_asked()
    return network.eval()


@torch.enable_grad()  # scores are computed without
@torch.random.fork_rng(devices=[])  # the random numbers of a training are left alone
def load_classifier(data):
    """The classifier for this data; trained once, then kept in the user's cache folder."""
    recipe = inspect.getsource(make_classifier) + inspect.getsource(train_classifier) + str(FEATURES)
    key = hashlib.sha256(recipe.encode() + data.samples.numpy().tobytes() + data.labels.numpy().tobytes()).hexdigest()
    folder = build.cache_folder()
    path = folder / f"classifier-{key[:16]}.pt"
    with contextlib.suppress(Exception):  # there is none, or a damaged one
        network = make_classifier()
        network.load_state_dict(load_checkpoint(path))
        return network.eval()
    tqdm.write(f"scores  training a classifier of {data.name}, once, in about a minute")
    network = train_classifier(data.samples, data.labels)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, packed(network.state_dict()))
    except OSError as error:
        tqdm.write(f"scores  the classifier cannot be kept in {folder}: {error}")
    return network


def mixture_scores(points, centres, sigma):
    """演習問題2: PacGAN's scores (arXiv 1712.04086, 4.1) of points [N, 2] for Gaussians around centres [K, 2].

    A point counts for its nearest centre if it lies within 3 sigma of it; one such point captures a mode. KL is
    that of the counts from K equal shares, None if no point counts.
    """
    distance, nearest = torch.cdist(finite(points), centres, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    counts = nearest[distance < 3 * sigma].bincount(minlength=len(centres))
    return {"modes": (counts > 0).sum().item(), "high_quality": counts.sum().item() / len(points),
            "KL": divergence(counts, 1 / len(centres)), "counts": counts.tolist()}


class PointScorer:
    """Scores of a generator of points. Its floor is what a perfect sampler scores on average."""

    floor_name, curves = "perfect sampler", [("modes captured", ["modes"]), ("KL divergence", ["KL"]),
                                             ("samples within 3 sigma", ["high_quality"])]
    count, about = 2500, {}

    def __init__(self, args):
        self.mixture, modes = MIXTURES[args.dataset], len(MIXTURES[args.dataset][0])
        self.against = f"the {modes} Gaussians of {args.dataset}"
        within = 1 - math.exp(-9 / 2)  # chi-squared of two dimensions; KL: the bias of counts, to first order
        self.floor = {"modes": modes, "high_quality": within, "KL": (modes - 1) / (2 * self.count * within)}

    def __call__(self, pipeline):
        return mixture_scores(pipeline(*pipeline.latents(self.count)), *self.mixture)


class ImageScorer:
    """Scores of a generator of images: as many samples as there are test images, read by the classifier.

    Its floor: the held-out training images, which the classifier has not seen either, in the place of samples. The
    data are read and checked at once, the classifier is trained when it is first needed.
    """

    floor_name, curves = "real images", [("Frechet distance", ["FD"]), ("Inception Score", ["IS"]),
                                         ("precision and recall", ["precision", "recall"])]

    def __init__(self, args):
        self.args, self.size = args, (getattr(args, "image_size", 28), args.channels)
        train, self.test = (load_data(args.dataset, args.data_dir, split) for split in ("train", "test"))
        self.rest, self.held_out = hold_out(train)
        self.count, self.against = len(self.test.samples), f"the test images of {args.dataset}"
        if min(len(self.rest.samples) - 256, len(self.held_out.samples) - 5, self.count - 5) < 0:
            fail(f"{len(train.samples)} training and {self.count} test images are too few to score "
                 "samples with; --eval-interval 0 trains without scores")

    @functools.cached_property
    def classifier(self):
        return load_classifier(self.rest)

    @functools.cached_property
    def reference(self):
        """Features and class probabilities of the test images."""
        return self.read(self.real(self.test))

    @functools.cached_property
    def about(self):
        """Which classifier it is: its accuracy, and a fingerprint of its weights."""
        weights = b"".join(value.numpy().tobytes() for value in self.classifier.state_dict().values())
        right = self.reference[1].argmax(1) == self.test.labels
        return {"classifier": {"accuracy": right.double().mean().item(),
                               "fingerprint": hashlib.sha256(weights).hexdigest()[:8]}}

    def real(self, data):
        """Batches of real images as a generator makes them: of its size, in [-1, 1]."""
        for part in data.samples.split(250):
            yield (part if self.size == (28, 1) else enlarge(part, *self.size, "cpu")).float() / 127.5 - 1

    @torch.no_grad()
    def read(self, batches):
        """Features [N, FEATURES] and class probabilities [N, 10] of batches of images in [-1, 1]."""
        features = []
        for images in batches:
            stop_if_asked()
            pixels = ((finite(images).clamp(-1, 1) + 1) * 127.5).round() / 255  # 8 bits, as in a file
            if pixels.size(3) != 28:
                pixels = F.adaptive_avg_pool2d(pixels, 32)[:, :, 2:-2, 2:-2]  # back from `enlarge`
            features.append(self.classifier[:-1](pixels.mean(1, keepdim=True)))  # the classifier reads grey values
        features = torch.cat(features)
        return features, self.classifier[-1](features).softmax(1)

    def compare(self, features, probabilities, labels):
        """The scores of samples that were read so, and of which these labels [N] were asked."""
        reading, shares = probabilities.argmax(1), self.test.labels.bincount(minlength=10) / len(self.test.labels)
        counts = reading.bincount(minlength=10)
        precision, recall = precision_recall(features, self.reference[0])
        covered = (counts >= 0.1 * shares * len(reading)) & (shares > 0)
        scores = {"IS": inception_score(probabilities), "FD": frechet_distance(features, self.reference[0]),
                  "precision": precision, "recall": recall,
                  "classes": covered.sum().item(), "KL": divergence(counts, shares)}
        if self.args.classes:
            scores["as_asked"] = (reading == labels).double().mean().item()
        return {**scores, "counts": counts.tolist()}

    @functools.cached_property
    def held_out_features(self):
        return self.read(self.real(self.held_out))

    @functools.cached_property
    def floor(self):
        scores = self.compare(*self.held_out_features, self.held_out.labels)
        return scores | {"FD_held_out": scores["FD"]} if self.args.eval_interval else scores

    def __call__(self, pipeline):
        z, labels = pipeline.noise(self.count), self.test.labels  # the classes as often as in the data
        features, probabilities = self.read(map(pipeline, z.split(250), labels.split(250)))
        scores = self.compare(features, probabilities, labels)
        if self.args.eval_interval:  # then the run has not seen them
            scores["FD_held_out"] = frechet_distance(features, self.held_out_features[0])
        return scores


def make_scorer(args):
    """What scores the generators of this data set, or None if nothing can."""
    if args.dataset in MIXTURES:
        return PointScorer(args)
    return ImageScorer(args) if args.dataset in CLASSIFIED else None


def show_scores(scorer, scores):
    """The table on the terminal; scores: {checkpoint: its epoch and scores}."""
    columns = {f"{Path(name).stem}, epoch {row['epoch']}": row for name, row in scores.items()}
    columns[scorer.floor_name] = scorer.floor
    reader = scorer.about.get("classifier")
    print(f"scores  {scorer.count} samples against {scorer.against}" +
          (f", read by a classifier that is right on {reader['accuracy']:.2%} of the test images, "
           f"fingerprint {reader['fingerprint']}" if reader else ""))
    widths = {heading: max(11, len(heading) + 2) for heading in columns}
    print(" " * 32 + "".join(f"{heading:>{width}}" for heading, width in widths.items()))
    for name, (title, form, best) in SCORES.items():
        cells = [(column.get(name), widths[heading]) for heading, column in columns.items()]
        if any(value is not None for value, _ in cells):
            row = "".join(f"{'-' if value is None else format(value, form):>{width}}" for value, width in cells)
            print(f"{title:32}{row}  {best}")
    for heading, column in columns.items():
        if "counts" in column:
            print(f"{heading + ': counts':32}{' '.join(map(str, column['counts']))}")


def save_scores(scorer, seed, scores, path):
    """The same as a JSON file."""
    content = {"samples": scorer.count, "against": scorer.against, **scorer.about, "seed": seed, **scores,
               scorer.floor_name: scorer.floor}
    write_whole(path, json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------
# 6  Pictures
# ---------------------------------------------------------------------------------------------

def save_picture(samples, columns, path, paths=False, reach=1.5):
    """Write a PNG: images [N, C, H, W] in [-1, 1] as a grid (erratum 11), points [N, 2] as a scatter plot.

    With `paths`, each `columns` successive points are one path through the plane. The plot of points shows
    [-reach, reach] in both directions.
    """
    from matplotlib.figure import Figure
    from torchvision.utils import save_image

    if samples.dim() == 4:
        enlarged = F.interpolate(samples, scale_factor=max(1, 64 // samples.size(3)))
        content = io.BytesIO()
        save_image(enlarged, content, format="png", nrow=columns, padding=4, normalize=True, value_range=(-1, 1))
        return write_whole(path, content.getvalue())
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
    if paths:
        for path_points in samples.split(columns):
            axes.plot(*path_points.T.numpy(), ".-")
    else:
        axes.scatter(*samples.T.numpy(), s=3, alpha=0.5)
    save_figure(figure, path)


def save_panels(panels, path):
    """Image grids side by side with a title each; panels: {title: (images [N, C, H, W] in [-1, 1], columns)}."""
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    grids = {title: make_grid(images, columns, normalize=True, value_range=(-1, 1), pad_value=1)
             for title, (images, columns) in panels.items()}
    height, width = max(g.size(1) for g in grids.values()), sum(g.size(2) for g in grids.values())
    figure = Figure(figsize=(width / 50 + 0.2 * len(grids), height / 50 + 0.5), layout="constrained")
    ratios = [g.size(2) for g in grids.values()]
    for axes, (title, grid) in zip(np.atleast_1d(figure.subplots(1, len(grids), width_ratios=ratios)), grids.items()):
        axes.imshow(grid.permute(1, 2, 0).numpy())
        axes.set_title(title)
        axes.axis("off")
    save_figure(figure, path)


def save_curves(history, plots, path):
    """Panels, four in a row, over the epochs of `history`: (title, quantities, {label: the value at convergence})."""
    from matplotlib.figure import Figure

    rows, columns = math.ceil(len(plots) / 4), min(4, len(plots))
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in grid[len(plots):]:
        axes.axis("off")
    for axes, (title, names, guides) in zip(grid, plots):
        for name in names:
            points = [(row["epoch"], row[name]) for row in history if row.get(name) is not None]  # scores: not in all
            axes.plot(*zip(*points), label=name, marker="." if len(points) < max(2, len(history)) else None)
        for label, value in guides.items():
            axes.axhline(value, color="gray", linestyle="--", linewidth=1, label=label)
        # What fell by orders of magnitude has a logarithmic axis, or the first epochs would dwarf all others.
        values = np.array([row[name] for row in history for name in names if row.get(name) is not None] or [0])
        median = np.median(np.abs(values))
        if np.abs(values).max() > 20 * median > 0:
            if values.min() > 0:
                axes.set_yscale("log")
            else:  # linear around 0
                axes.set_yscale("symlog", linthresh=10 ** math.ceil(math.log10(median)), subs=[2, 5])
                axes.yaxis.set_minor_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    save_figure(figure, path)


def save_figure(figure, path):
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    write_whole(path, content.getvalue())


def save_film(samples, path):
    """A looping GIF of a run's pictures of its epochs, the last one shown longer."""
    pictures = sorted(samples.glob("epoch_*.png"), key=lambda picture: (len(picture.name), picture.name))
    frames = [Image.open(picture).convert("P", palette=Image.Palette.ADAPTIVE) for picture in pictures]
    content = io.BytesIO()
    frames[0].save(content, format="gif", save_all=True, append_images=frames[1:], loop=0,
                   duration=[250] * (len(frames) - 1) + [2000])
    write_whole(path, content.getvalue())
