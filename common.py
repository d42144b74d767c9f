"""Plumbing of the numbered scripts: everything that is the same in all of them.

1  Command line    flags, the options of a call, what is said where a script cannot go on
2  Run             the folder, the epoch line, the log and the checkpoints of one training run; sampling from it
3  Pipeline        the text's image-generation pipeline (実装例8, 3.6) around one generator
4  Data            real MNIST, digits drawn from fonts, the Gaussians of 実装例3, images of your own; batches
5  Scores          what a generator has learned, in numbers (3.2, 3.6, 演習問題2 and 5)
6  Pictures        image grids, scatter plots, curves, the film of a run
7  torchrun        one training run in several processes

No loss and no training step of a GAN is in this file. Beside the text stand section 3, MIXTURES of section 4,
and section 5.
"""

import argparse
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import distributed, nn
from tqdm import tqdm

from csrc import build, ops
from csrc.compare import compare_kernels  # noqa: F401  for the scripts, like the next line
from csrc.ops import Dropout, fused  # noqa: F401

# torchvision and matplotlib take longer to import than --help may: they are imported where they are used.

# ---------------------------------------------------------------------------------------------
# 1  Command line
# ---------------------------------------------------------------------------------------------

DEFAULTS = dict(seed=0, device="auto", dataset="auto", data_dir="data", output_dir="runs", image_size=28, channels=1,
                classes=0, ema_decay=0, lr_decay=0, max_batches=None, sample_interval=None, eval_interval=None,
                resume=None, run=None, compare_kernels=False, evaluate=False, generate=None, interpolate=False,
                explore=None, styles=False, label=None)
SAMPLING = "sampling, with --from"  # the heading in --help of what needs a trained run


def fail(message, code=2):
    """Print one line on stderr and exit; exit code 2 means bad input."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


TROUBLES = {  # words of an error: what to say instead; the first that fits
    "CUDA.*out of memory|_ALLOC_FAILED":
        "the GPU has too little memory left (nvidia-smi shows which processes hold it); try a smaller --batch-size",
    "MemoryError|[Oo]ut of memory|OutOfMemory|bad_alloc|[Cc]an(no|')t allocate memory|not enough memory":
        "there is too little memory; try a smaller --batch-size",
    "no kernel image is available":
        f"torch {torch.__version__} was not built for this GPU; install another build of it, or use --device cpu",
    "torchvision::": "torch and torchvision are of different builds; reinstall both by requirements.txt"}


def guarded(main):
    """Run a script's main; what a user can mend ends it in one line on stderr, not in a traceback.

    Exit codes: 1 for what fails in mid-run, 2 for bad input, 128 + its number for a signal. The process is left as it
    was: a script may be run inside a notebook.
    """
    handlers = {number: signal.signal(number, Run.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    Run.current = None
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stream has none
        sys.stdout.reconfigure(errors="replace")  # "?" for what a terminal's encoding lacks
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        if isinstance(stop, BrokenPipeError):  # nobody reads the output any more, as after "| head"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        run = Run.current
        print(f"interrupted after {run.epoch} epochs; to resume: {run.command('--resume')}" if run else "interrupted",
              file=sys.stderr)
        raise SystemExit(128 + (stop.args[0] if isinstance(stop, KeyboardInterrupt) else signal.SIGINT)) from None
    except (OSError, MemoryError, RuntimeError) as error:
        known = [line for words, line in TROUBLES.items() if re.search(words, f"{type(error).__name__}: {error}")]
        if not known and not isinstance(error, OSError):
            raise
        fail(known[0] if known else error, code=1 if Run.current else 2)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def number(kind, low, high=10**9):
    """An argparse type: an int or a float from `low` to `high`."""
    def parse(text):
        if not low <= kind(text) <= high:  # nor NaN
            raise ValueError
        return kind(text)
    parse.__name__ = f"{kind.__name__} from {low} to {high}"  # argparse: "invalid int from 1 to 9 value: '0'"
    return parse


COUNT, WEIGHT = dict(type=number(int, 1), metavar="N"), dict(type=number(float, 0), metavar="X")
SHARE, DECAY = dict(type=number(float, 0, 1), metavar="X"), dict(type=number(float, 0, 0.999999), metavar="X")
SWITCH, FOLDER = dict(action="store_true"), dict(metavar="DIR", type=os.path.expanduser)
FLAGS = [  # of every script: group in --help, flag, help, what argparse is told of its value
    ("options", "--epochs", "rounds of (samples // batch size) generator steps", COUNT),
    ("options", "--data-dir", "folder that holds, or receives, MNIST; or that holds your images", FOLDER),
    ("options", "--output-dir", "folder that receives the run's folder", FOLDER),
    ("options", "--from", "sample from this trained run (folder or checkpoint)", dict(dest="run", **FOLDER)),
    ("options", "--resume", "continue this run, by default the newest; --epochs may grow",
     dict(nargs="?", const="", **FOLDER)),
    ("training", "--batch-size", "samples per step", dict(type=number(int, 2), metavar="N")),  # 2: for BatchNorm
    ("training", "--lr-g", "Adam's learning rate, generator", WEIGHT),
    ("training", "--lr-d", "Adam's learning rate, discriminator or critic", WEIGHT),
    ("training", "--beta1", "Adam's first beta", DECAY),
    ("training", "--lr-decay", "share of the training, at its end, in which the learning rates fall to 0", SHARE),
    ("training", "--latent-dim", "numbers in one latent vector z", COUNT),
    ("training", "--ema-decay", "sample from a moving average of the generator, which keeps this much per step", DECAY),
    ("training", "--max-batches", "at most N generator steps per epoch, for a quick look", COUNT),
    ("training", "--seed", "seed of all random numbers", dict(type=number(int, 0, 2**32 - 1), metavar="N")),
    ("training", "--device", "where to compute: auto, cpu, cuda or mps", dict(metavar="NAME")),
    ("output", "--sample-interval", "epochs between sample pictures (default: a twentieth of the run)", COUNT),
    ("output", "--eval-interval", "epochs between scores; 0: no scores (default: scores at the end)",
     dict(type=number(int, 0), metavar="N")),
    (SAMPLING, "--evaluate", "score it", SWITCH),
    (SAMPLING, "--generate", "a picture of N samples, of several classes in whole rows (default: 64)", COUNT),
    (SAMPLING, "--interpolate", "paths between latent vectors", SWITCH),
    (SAMPLING, "--explore", "move latent dimension DIM by -3 to 3", dict(type=number(int, 0), metavar="DIM")),
]


class Parser(argparse.ArgumentParser):
    """The command line of one numbered script.

    constants: its table, a row of option values per variant. flags: its own, as in FLAGS. The option "variant" picks
    the row, by default the first; data sets of points have the row "points". A flag that is not given takes the value
    of its row, so the table is the only place of defaults. `given` holds what was given.

    image_sizes: of a script whose networks come in several sizes; such a script also has --channels and takes
    images of your own. kernels: whether a part of the script has fused kernels.
    """

    def __init__(self, script, description, constants, flags=(), image_sizes=(), kernels=False):
        summary, _, details = (description or "").partition("\n")  # python -OO leaves out docstrings
        super().__init__(prog=Path(script).name, usage="python %(prog)s [flags]", description=summary, epilog=details,
                         argument_default=argparse.SUPPRESS, allow_abbrev=False,
                         formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30))
        self.script, self.constants, self.error = Path(script).stem, constants, fail
        self.defaults = {**DEFAULTS, "kernels": "auto" if kernels else None}
        datasets = ["auto", *CLASSIFIED, *["folder"] * bool(image_sizes), *(MIXTURES if "points" in constants else ())]
        flags = [("options", "--dataset", "auto: MNIST if it can be had, else drawn digits", dict(choices=datasets)),
                 *FLAGS, *flags]
        if image_sizes:
            flags += [("training", "--image-size", "height and width in pixels", dict(type=int, choices=image_sizes)),
                      ("training", "--channels", "1: grey, 3: colour", dict(type=int, choices=(1, 3)))]
        if kernels:
            flags += [("training", "--kernels", "fused: those of csrc/; reference: PyTorch's own operations; auto: "
                       "fused where they can be compiled", dict(choices=["auto", "fused", "reference"]))]
        self.groups = {"options": self}
        for group, flag, text, settings in flags:
            if group not in self.groups:
                self.groups[group] = self.add_argument_group(group)
            action = self.groups[group].add_argument(flag, help=text, **settings)
            values = {row: {**self.defaults, **table}.get(action.dest) for row, table in constants.items()}
            if len(set(values.values())) > 1:
                action.help += f" (default: {', '.join(f'{row} {value}' for row, value in values.items())})"
            elif (value := values.popitem()[1]) is not None and value is not False:
                action.help += f" (default: {value})"

    def options(self, argv=None):
        """The options of this call as a Namespace: the table's or, with --from and --resume, those of that run."""
        given = self.given = vars(self.parse_args(argv))
        sampling = {action.dest for action in self.groups[SAMPLING]._group_actions}
        if "run" in given:
            options = self._of_run("run", {*sampling, "seed", "device", "data_dir", "output_dir"})
            options |= {"resume": None, "device": given.get("device", "auto"), "output_dir": given.get("output_dir")}
        elif "resume" in given:
            options = self._of_run("resume", {"epochs", "data_dir", "output_dir", "device", "kernels"})
        elif wishes := sampling & given.keys():
            fail(f"{self._flags(wishes)}: name a trained run with --from")
        else:
            points = given.get("dataset") in MIXTURES
            if points and "variant" in given:
                fail(f"{self._flags(['variant'])} is for images; --dataset {given['dataset']} has its own networks")
            variant = given.setdefault("variant", "points" if points else next(iter(self.constants)))
            options = {"script": self.script, **self.defaults, **self.constants[variant], **given}
        args = argparse.Namespace(**options)
        if args.dataset == "folder" and (args.evaluate or args.eval_interval):
            fail("images of your own have no test images and no classes to score samples with")
        args.device = pick_device(args.device)
        if PROCESSES > 1:
            join_torchrun(args)
        torch.manual_seed(args.seed)
        return args

    def _of_run(self, name, allowed):
        """The options of a trained run, which only a few flags may change."""
        given, path, flag = self.given, Path(self.given[name]), self._flags([name])
        if refused := given.keys() - allowed - {name}:
            fail(f"{flag} keeps the settings of the run; leave out {self._flags(refused)}")
        if not given[name]:  # --resume alone
            folder = Path(given.get("output_dir", DEFAULTS["output_dir"]))
            found = filter(Path.exists, folder.glob(f"{self.script}-*/checkpoint.pt"))  # no dangling links
            path = max(found, key=os.path.getmtime, default=None) or fail(
                f"--resume: there is no run of {self.script} in {folder}; name one, or its folder with --output-dir")
        path = path / "checkpoint.pt" if path.is_dir() else path
        options = load_checkpoint(path)["options"]
        if options["script"] != self.script:
            fail(f"{flag}: {path} was trained by {options['script']}, not by {self.script}")
        if name == "resume" and "samples" not in options:
            fail(f"--resume: {path} is of an earlier version, which can finish it; here --from can draw from it")
        return {**self.defaults, **options, **given, name: str(path)}

    def _flags(self, names):
        return ", ".join(action.option_strings[0] for action in self._actions if action.dest in names)


def pick_device(wanted):
    """The device that `wanted` (auto, cpu, cuda or mps) stands for on this machine."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name, here in usable.items() if here) if wanted == "auto" else wanted
    if not usable.get(device):
        fail(f"--device {wanted}: this torch ({torch.__version__}) has {', '.join(filter(usable.get, usable))} here; "
             "another GPU than the first is chosen by the environment variable CUDA_VISIBLE_DEVICES")
    return device


# ---------------------------------------------------------------------------------------------
# 2  Run
# ---------------------------------------------------------------------------------------------

def write(path, content):
    """Write a file, text or what content(file) writes: whatever happens, it is the old one or the new one, whole."""
    whole, temporary = io.BytesIO(), Path(f"{path}.tmp")
    whole.write(content.encode()) if isinstance(content, str) else content(whole)
    try:
        with open(temporary, "wb") as file:
            file.write(whole.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path):
    """What Run.save wrote, on the CPU; exits with code 2 where there is no whole file."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # the checksums, at which torch.load does not look
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["options"]["script"]  # else it is a file of somebody else
        return content
    except Exception as error:  # noqa: BLE001  whatever a damaged or foreign file raises
        fail(f"{path} is not there, damaged, or no checkpoint of these scripts ({type(error).__name__})")


class Run:
    """One training run: its folder, epoch lines, log, pictures, scores and checkpoints.

    plots: the panels of curves.png, as save_curves takes them. styles: further pictures to draw at the end, {name:
    function of the pipeline and a path}. state: every module and optimizer of the training by name, `generator` among
    them. With --ema-decay its moving average is added as `average`; that one is sampled and scored.

        run = Run(args, generate_noise, plots, generator=..., critic=..., ...)
        for batches in run.epochs():            # the endless stream of real batches
            for _ in run.steps():               # N // batch generator steps
                run.record(step(...))           # quantities to average over the epoch

    A checkpoint is saved at the start, after the steps of each epoch, before its log, pictures and scores, every
    SAVE_SECONDS, and when a signal ends the run. From there --resume continues as if nothing had happened.
    """

    SAVE_SECONDS = 600
    PLACE = ("epoch", "step", "history", "sums", "seconds")  # in the training, with the stream of batches
    current = None  # the run of this process, for the handler of signals

    def __init__(self, args, draw_noise, plots, styles=None, **state):
        self.args, self.plots, self.styles, self.state = args, plots, styles or {}, state
        print(f"{args.script}, {args.variant}, seed {args.seed}")
        self.data = load_data(args, "train", args.device)
        samples, args.dataset, args.torch = len(self.data.samples), self.data.name, str(torch.__version__)
        args.threads = torch.get_num_threads()
        print(f"device  {args.device}, {args.threads} threads, torch {args.torch}")
        print(f"data    {args.dataset}, {samples} samples, batch {args.batch_size}")
        if samples < args.batch_size:
            fail(f"--batch-size {args.batch_size} exceeds the {samples} training samples")
        if args.resume and samples != args.samples:
            fail(f"--resume: there are {samples} training samples, the run has {args.samples}; see --data-dir")
        args.samples, args.kernels = samples, args.kernels and ops.choose(args.kernels, args.device)

        if args.ema_decay:
            state["average"] = copy.deepcopy(state["generator"])
        self.steps_per_epoch = min(samples // (args.batch_size * PROCESSES), args.max_batches or sys.maxsize)
        self.epoch, self.step, self.history = 0, 0, []  # epochs in the log, steps done, rows of the log
        self.sums, self.seconds = {}, 0.0  # of this epoch
        self.scorer, self.in_steps, self.signal = None, False, None
        self.pipeline = Pipeline(state.get("average", state["generator"]), draw_noise, args)
        if args.resume:
            self.folder = Path(args.resume).parent
            self._restore(load_checkpoint(args.resume))
        else:
            stem = f"{args.script}-{args.dataset}"
            self.folder = next(folder for index in itertools.count(1)
                               if not (folder := Path(args.output_dir, f"{stem}-{index:04d}")).exists())
        self.optimizers = [part for part in state.values() if isinstance(part, torch.optim.Optimizer)]
        self.groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group in self.groups:
            group.setdefault("initial_lr", group["lr"])  # else it came with the checkpoint
        if PROCESSES > 1:  # the weights are the same everywhere; from here on each draws numbers of its own
            torch.manual_seed(args.seed + self.step + RANK * 2**20)
            for optimizer in self.optimizers:
                optimizer.register_step_pre_hook(average_gradients)
        self.samples = self.folder / "samples"
        self.samples.mkdir(parents=True, exist_ok=bool(args.resume))
        print(f"output  {self.folder}: {args.epochs} epochs of {self.steps_per_epoch} generator steps" +
              f", resumed after step {self.step}" * bool(args.resume), flush=True)
        write(self.folder / "options.json", json.dumps(vars(args), indent=2) + "\n")
        if not args.resume:
            self._first_pictures()
            self.started = time.perf_counter()
            self.save()
        Run.current = self

    def command(self, flag):
        """The command that gives the run's folder to `flag`."""
        start = f"torchrun --nproc-per-node {PROCESSES}" if flag == "--resume" and PROCESSES > 1 else "python"
        script = os.path.relpath(Path(__file__).with_name(f"{self.args.script}.py"))
        return f"{start} {shlex.join([script, flag, str(self.folder)])}"

    def epochs(self):
        """The stream of (real, labels) batches, once per epoch; log, pictures and scores in between."""
        self.saved = time.perf_counter()
        self.bar = tqdm(total=self.args.epochs * self.steps_per_epoch, initial=self.step, unit="step", disable=None,
                        leave=False, dynamic_ncols=True)  # disable=None: on terminals only
        while self.epoch < self.args.epochs:
            if self.step == self.epoch * self.steps_per_epoch:  # else resumed in mid-epoch
                self.data.order = self.data.order[:0]  # each epoch has a new order
            self.started = time.perf_counter() - self.seconds
            yield self.data
            self._end_epoch()
            self.sums, self.seconds, self.started = {}, 0.0, time.perf_counter()
        self.save()
        self.bar.close()
        print(f"done    look at {self.samples / 'final.png'} and {self.folder / 'curves.png'}")
        print(f"more    {self.command('--from')}")

    def steps(self):
        """Counts the generator steps of one epoch; sets the learning rates, updates the moving average, saves."""
        self.in_steps = True  # from here on a signal waits for the end of its step
        end, total = (self.epoch + 1) * self.steps_per_epoch, self.args.epochs * self.steps_per_epoch
        while self.step < end:
            for group in self.groups if self.args.lr_decay else ():
                group["lr"] = group["initial_lr"] * min(1, (1 - self.step / total) / self.args.lr_decay)
            yield
            self.step += 1
            if "average" in self.state:
                update_average(self.state["average"], self.state["generator"], self.args.ema_decay, self.step)
            self.bar.update()
            if self.step == end or self.signal or time.perf_counter() - self.saved > self.SAVE_SECONDS:
                self.save()
            if self.signal and RANK == 0:
                raise KeyboardInterrupt(self.signal)
        self.in_steps = False

    @staticmethod
    def interrupt(number, frame):
        """Handles signals: in a training step the first one waits for the end of the step; all others end at once."""
        if Run.current and Run.current.in_steps and not Run.current.signal:
            Run.current.signal = number
        elif RANK == 0:
            raise KeyboardInterrupt(number)

    def record(self, quantities):
        """Add 0-d tensors by name to this epoch's means; they stay on the device until the epoch ends."""
        for name, value in quantities.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = total + value.detach(), count + 1

    def _end_epoch(self):
        """The steps of an epoch are done: its line, its row of the log, its pictures and scores."""
        args, seconds = self.args, time.perf_counter() - self.started
        row = {name: (total / count).item() for name, (total, count) in self.sums.items()}
        self.epoch += 1
        self.history.append({"epoch": self.epoch, "step": self.step, "seconds": round(seconds, 3), **row})
        values = "  ".join(f"{name} {value:9.4f}" for name, value in row.items())
        tqdm.write(f"epoch {self.epoch:{len(str(args.epochs))}d}/{args.epochs}  {values}  {seconds:7.2f} s")
        last = self.epoch == args.epochs
        shown = last or self.epoch % (args.sample_interval or max(1, args.epochs // 20)) == 0
        interval = args.epochs if args.eval_interval is None else args.eval_interval
        if shown:
            self.pipeline.generate(self.pipeline.count, self.samples / f"epoch_{self.epoch:04d}.png")
        if last:
            self._final_pictures()
        if args.dataset != "folder" and interval and (last or self.epoch % interval == 0):
            self._score()
        if shown or self.scorer:
            save_curves(self.history, self.plots, self.folder / "curves.png")
        write(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in self.history))

    def _first_pictures(self):
        """Real samples, a row of each class if the generator knows classes, and what it makes of noise at first."""
        count, args = self.pipeline.count, self.args
        index = torch.arange(count) * args.samples // count  # from all over the data: folders come class by class
        if args.classes:
            index = torch.cat([(self.data.labels == c).nonzero()[:8, 0].cpu() for c in range(args.classes)])
        save_picture(self.data.scaled(index.to(args.device)).cpu(), 8, self.samples / "real.png")
        self.pipeline.generate(count, self.samples / "epoch_0000.png")

    def _final_pictures(self):
        self.pipeline.generator.eval()  # its training is over; the styles are drawn by parts of it
        self.pipeline.generate(self.pipeline.final, self.samples / "final.png")
        self.pipeline.interpolate(self.samples / "interpolation.png")
        dimensions = range(min(self.pipeline.rows, self.args.latent_dim))
        self.pipeline.explore(dimensions, self.samples / "latent_walk.png", one_base=True)
        for name, draw_style in self.styles.items():
            draw_style(self.pipeline, self.samples / f"{name}.png")
        save_film(self.samples, self.samples / "progress.gif")

    def _score(self):
        """Score the generator, add that to the epoch's row of the log, show and keep them."""
        if not self.scorer:
            self.scorer = make_scorer(self.args)
            if self.args.eval_interval:  # with one score there is no curve
                kind, floor = self.scorer.floor_name, self.scorer.floor
                self.plots = self.plots + [(title, [name], {f"{kind} {floor[name]:{form}}": floor[name]})
                                           for name, (title, form, _) in SCORES.items() if name in floor]
        scores = self.scorer(self.pipeline)
        self.history[-1] |= scores
        report(self.scorer, self.epoch, scores, self.args.seed, self.folder / "metrics.json")

    def save(self):
        """Write checkpoint.pt: options, all states, and the place in the training, where --resume continues."""
        networks = {name: part.state_dict() for name, part in self.state.items() if isinstance(part, nn.Module)}
        values = {name: total for name, (total, _) in self.sums.items()}
        values |= {f"{name}.{key}": value for name, state in networks.items() for key, value in state.items()}
        if bad := [name for name, value in values.items() if not value.isfinite().all()]:
            self.bar.close()
            fail(f"{bad[0]} is no longer finite in step {self.step}, epoch {self.epoch + 1}; try smaller --lr-g and "
                 f"--lr-d (the last good checkpoint is in {self.folder})", code=1)
        self.seconds = time.perf_counter() - self.started
        content = {"options": vars(self.args), **{name: getattr(self, name) for name in self.PLACE},
                   "order": self.data.order, "position": self.data.position, "random": torch.get_rng_state(),
                   **{name: part.state_dict() for name, part in self.state.items()}}
        if self.args.device != "cpu":
            content["random_device"] = torch.get_device_module(self.args.device).get_rng_state()
        write(self.folder / "checkpoint.pt", lambda file: torch.save(content, file))
        self.saved = time.perf_counter()

    def _restore(self, content):
        """Continue from a checkpoint: every state as it was when it was written."""
        here, then = vars(self.args), content["options"]
        if any(here[name] != then[name] for name in ("torch", "threads", "device", "kernels")):
            print("resume  under another torch, device or number of threads: what follows is not the same to the bit")
        for name, part in self.state.items():
            part.load_state_dict(content[name])
        for name in self.PLACE:
            setattr(self, name, content[name])
        if self.epoch >= self.args.epochs:
            fail(f"--resume: the run is complete after {self.epoch} epochs; a larger --epochs trains on")
        self.data.order, self.data.position = content["order"].to(self.args.device), content["position"]
        torch.set_rng_state(content["random"])
        if self.args.device == then["device"] != "cpu":
            torch.get_device_module(self.args.device).set_rng_state(content["random_device"])


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


def sample(args, generator, draw_noise, styles=None):
    """--from: load the run's generator, score it, write the pictures that were asked for into its samples/."""
    def save(name, draw, *inputs):
        label = "" if args.label is None else f"-class{args.label}"
        path = folder / f"{name}{label}-seed{args.seed}.png"
        draw(*inputs, path)
        print(path)

    content, folder = load_checkpoint(args.run), Path(args.output_dir or Path(args.run).with_name("samples"))
    folder.mkdir(parents=True, exist_ok=True)
    generator.load_state_dict(content.get("average", content["generator"]), assign=True)  # memory layout, too
    pipeline = Pipeline(generator.eval().to(args.device), draw_noise, args)
    if args.explore is not None and args.explore >= args.latent_dim:
        fail(f"--explore {args.explore}: the run's latent dimensions are 0 to {args.latent_dim - 1}")
    if args.evaluate:
        scorer = make_scorer(args)
        report(scorer, content["epoch"], scorer(pipeline), args.seed,
               Path(args.output_dir or Path(args.run).parent, "metrics.json"))
    if args.generate or not (args.evaluate or args.interpolate or args.styles or args.explore is not None):
        save(f"generated-{args.generate or 64}", pipeline.generate, args.generate or 64)
    if args.interpolate:
        save("interpolation", pipeline.interpolate)
    if args.explore is not None:
        save(f"latent_walk-dim{args.explore}", pipeline.explore, [args.explore] * pipeline.rows)
    for name, draw_style in styles.items() if args.styles else ():
        save(name, draw_style, pipeline)


# ---------------------------------------------------------------------------------------------
# 3  Pipeline
# ---------------------------------------------------------------------------------------------

class Pipeline:
    """The text's image-generation pipeline (実装例8, 3.6) around one generator: generate, interpolate, explore.

    実装例8 calls it ImageGenerationPipeline, its methods generate_images, interpolate_latent, explore_latent_space.

    generator: z [N, latent_dim] (and labels [N] if the options count `classes`) -> samples.
    draw_noise(count, args, device, generator): the script's latent distribution.
    Each picture's latents are drawn by a generator of its own: the same --seed gives the same
    picture, and the random numbers of a training are left alone (erratum 59). They are not those that a
    training with this seed begins with, either: its weights would be made of the same numbers.
    """

    STEPS = 10  # pictures in a row of an interpolation or a walk
    OTHER = 0x5EED5EED  # turns a seed into another one

    def __init__(self, generator, draw_noise, args):
        self.generator, self.args, self.rows = generator, args, args.classes or 8
        self.device = next(generator.parameters()).device
        self.count, self.final = 8 * self.rows, 16 * (args.classes or 16)  # samples in an epoch's and the last picture
        if args.dataset in MIXTURES:
            self.count = self.final = 2500
        self.noise = lambda count: draw_noise(count, args, "cpu", torch.Generator().manual_seed(args.seed ^ self.OTHER))

    @torch.no_grad()
    def __call__(self, z, labels):
        """Samples on the CPU, in eval mode; the generator's mode is restored."""
        inputs, was_training = (z, labels) if self.args.classes else (z,), self.generator.training
        self.generator.eval()
        samples = torch.cat([self.generator(*(part.to(self.device) for part in group)).cpu()
                             for group in zip(*(full.split(250) for full in inputs))])
        self.generator.train(was_training)
        return samples

    def generate(self, count, path):
        """A grid of samples; a conditional generator gets each z under every class, a row each, or under --class."""
        if self.args.classes and self.args.label is None:
            columns = math.ceil(count / self.args.classes)
            z = self.noise(columns).repeat(self.args.classes, 1)
            labels = torch.arange(self.args.classes).repeat_interleave(columns)
        else:
            columns, z = math.ceil(math.sqrt(count)), self.noise(count)
            labels = torch.full((count,), self.args.label or 0)
        save_picture(self(z, labels), columns, path)

    def interpolate(self, path):
        """Each row goes from one latent vector to another in a straight line, (1 - t) z1 + t z2 (erratum 61)."""
        z1, z2 = self.noise(2 * self.rows)[:, None].chunk(2)
        self._rows(torch.lerp(z1, z2, torch.linspace(0, 1, self.STEPS)[None, :, None]), path)

    def explore(self, dimensions, path, one_base=False):
        """Row r moves dimension `dimensions[r]` of a latent vector by -3 to +3 (erratum 16), the rest stands still."""
        z = self.noise(1 if one_base else len(dimensions)).expand(len(dimensions), -1)
        z = z[:, None].repeat(1, self.STEPS, 1)
        for row, dimension in enumerate(dimensions):
            z[row, :, dimension] += torch.linspace(-3, 3, self.STEPS)
        self._rows(z, path)

    def _rows(self, z, path):
        labels = torch.arange(len(z)) if self.args.label is None else torch.full((len(z),), self.args.label)
        samples = self(z.flatten(0, 1), labels.repeat_interleave(self.STEPS))
        save_picture(samples, self.STEPS, path, paths=True)


# ---------------------------------------------------------------------------------------------
# 4  Data
# ---------------------------------------------------------------------------------------------

class Data:
    """Labelled samples on one device, and an endless stream of batches (samples, labels) of them.

    samples: uint8 [N, C, H, W] for images, float32 [N, 2] for points; labels: int64 [N]; shape: of the images that a
    network sees. The stream is shuffled anew when fewer than a batch are left; a checkpoint holds its place, `order`
    and `position`.
    """

    def __init__(self, name, samples, labels, shape, batch_size):
        self.name, self.samples, self.labels, self.shape, self.batch_size = name, samples, labels, shape, batch_size
        self.order, self.position = torch.empty(0, dtype=torch.long), 0

    def __next__(self):
        if self.position + self.batch_size > len(self.order):
            self.order, self.position = torch.randperm(len(self.samples), device=self.samples.device), 0
        index = self.order[self.position:self.position + self.batch_size]
        self.position += self.batch_size
        return self.scaled(index), self.labels[index]

    def scaled(self, index):
        """Samples at `index` as a network sees them: points as they are, pixels scaled to [-1, 1].

        The scaling of 11.2.2 (erratum 13), 実装例2 and document 002.

        For a larger network 28x28 pixels get a black margin up to 32x32, then bilinear interpolation.
        """
        chosen = self.samples.index_select(0, index)  # ten times as fast as samples[index]
        if chosen.dtype != torch.uint8:
            return chosen
        images = chosen.float()
        if images.shape[1:] != self.shape:
            images = F.pad(images, (2, 2, 2, 2) if self.shape[2] > 28 else (0, 0, 0, 0))
            images = F.interpolate(images, self.shape[1:], mode="bilinear").round_().expand(-1, self.shape[0], -1, -1)
        return images.div(127.5).sub_(1)


CLASSIFIED = ("mnist", "fashion-mnist", "digits")  # data sets of ten classes of grey 28x28 images


def load_data(args, split="train", device="cpu"):
    """The data set of --dataset, its "train" or "test" split. Only "auto" may end up with other data, and says so.

    Exits with code 2 where the data are not there, damaged or not what they should be.
    """
    name, shape = args.dataset, (args.channels, args.image_size, args.image_size)
    if name in ("auto", "mnist", "fashion-mnist"):
        name, samples, labels = read_mnist(args, split)
    elif name == "digits":
        samples, labels = draw_digits(split)
    elif name in MIXTURES:
        samples, labels = draw_mixture(name, split)
    else:
        samples, labels = read_folder(args.data_dir, args.image_size, args.channels)
    return Data(name, samples.to(device), labels.to(device), shape, args.batch_size)


def read_mnist(args, split):
    """A name, images uint8 [N, 1, 28, 28] and labels [N], by torchvision; drawn digits where "auto" finds no MNIST."""
    from torchvision import datasets

    kind = datasets.FashionMNIST if args.dataset == "fashion-mnist" else datasets.MNIST
    top, fashion = Path(args.data_dir), kind is datasets.FashionMNIST
    found = [str(path) for depth in ("", "*/", "*/*/", "*/*/*/") for path in sorted(top.glob(f"{depth}*ubyte*"))
             if fashion == ("FashionMNIST" in path.parts)]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)  # torchvision sets none: a silent server would be waited for without end
    try:
        data = kind(top, train=split == "train", download=True)  # unpacks and checks it, too
        if data.data.shape[1:] != (28, 28) or len(data.data) != len(data.targets) or data.targets.max() > 9:
            raise ValueError("these are no images of 28x28 pixels, each with a label from 0 to 9")
        return args.dataset.replace("auto", "mnist"), data.data[:, None], data.targets
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  no network, a damaged file, a folder that cannot be read
        reason = f"no {kind.__name__} in {top} ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        files = ", ".join(name.removesuffix(".gz") for name, _ in kind.resources)
        advice = f"put {files} (or .gz, from {kind.mirrors[0]}) into {top / kind.__name__ / 'raw'}"
        if found:
            fail(f"{reason}; there are {', '.join(found[:4])}. Expected: {advice}")
        if args.dataset != "auto":
            fail(f"{reason}; {advice}, or name another folder with --data-dir")
        print(f"{reason}; training on digits drawn from fonts. For MNIST, {advice}")
        return "digits", *draw_digits(split)
    finally:
        socket.setdefaulttimeout(before)


FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSerif",
         "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol",
         "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "cmb10", "cmss10", "cmtt10"]


def draw_glyphs():
    """The ten digits in every font, centred and blurred, [10, fonts, 1, 64, 64] in [0, 1]."""
    from torchvision.transforms.functional import gaussian_blur

    with plain_style():
        from matplotlib import get_data_path
    glyphs = np.zeros((10, len(FONTS), 64, 64), np.float32)
    for column, font in enumerate(FONTS):
        face = ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", f"{font}.ttf")), 58)
        for digit in range(10):
            left, top, right, bottom = face.getbbox(str(digit))
            canvas = Image.new("L", (64, 64))
            corner = 32 - (left + right) / 2, 32 - (top + bottom) / 2
            ImageDraw.Draw(canvas).text(corner, str(digit), fill=255, font=face)
            glyphs[digit, column] = np.asarray(canvas)
    return gaussian_blur(torch.from_numpy(glyphs / 255), 7, 1.5)[:, :, None]


@functools.cache
def draw_digits(split):
    """60,000 training or 10,000 test digits like MNIST's: uint8 [N, 1, 28, 28], labels [N].

    Each is a glyph under a random affine map, cut at a random level: a low level makes a bold stroke. They are the same
    everywhere, but for a few pixels that processors round to neighbouring grey levels.
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
    # PacGAN's (sec. 4.1 of arXiv 1712.04086), the grid at a quarter of its size: within [-1, 1], too.
    "ring": (torch.stack([torch.arange(8).mul(math.pi / 4).cos(), torch.arange(8).mul(math.pi / 4).sin()], 1), 0.01),
    "grid": (torch.cartesian_prod(torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 5)), 0.0125),
}


def draw_mixture(name, split):
    """実装例3: points [N, 2] of a mixture and the number of the centre of each [N]; PacGAN trains on 100,000."""
    count, seed = {"train": (60_000 if name == "gaussians" else 100_000, 1), "test": (10_000, 2)}[split]
    (centres, sigma), rng = MIXTURES[name], torch.Generator().manual_seed(seed)
    labels = torch.randint(len(centres), (count,), generator=rng)
    return centres[labels] + sigma * torch.randn(count, 2, generator=rng), labels


def points_layers(inputs, normalise=nn.Identity()):
    """The layers with which all networks for points begin: [N, inputs] -> [N, 128]. The text has none for points.

    normalise: what is done to each Linear layer; in 05 spectral_norm.
    """
    return [layer for size in (inputs, 128, 128) for layer in (normalise(nn.Linear(size, 128)), nn.LeakyReLU(0.2))]


def points_generator(latent_dim=100):
    """For points: z [N, latent_dim] -> points [N, 2], unbounded, since points lie outside [-1, 1]."""
    return nn.Sequential(*points_layers(latent_dim), nn.Linear(128, 2))


def points_critic():
    """The critic or discriminator for points: points [N, 2] -> scores or logits [N, 1]."""
    return nn.Sequential(*points_layers(2), nn.Linear(128, 1))


def read_folder(folder, image_size, channels):
    """All images below `folder`: uint8 [N, channels, image_size, image_size] and labels [N], all 0.

    The largest centred square of each is scaled to the size. Linked folders are followed once; what is hidden is passed
    over; what cannot be read is left out and counted by reason.
    """
    Image.init()
    kinds = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = 2**28, 2**26  # scans; prompts in the metadata
    paths, seen, left_out, kept = [], set(), {}, 0
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in folders if name[0] != "." and name not in ("@eaDir", "__MACOSX")]
        paths += [path for name in names if (path := Path(parent, name)).suffix.lower() in kinds and name[0] != "."]
    images = np.empty((len(paths), channels, image_size, image_size), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata
        for path in tqdm(sorted(paths), desc="reading", unit="image", disable=None, leave=False, dynamic_ncols=True):
            try:
                if not path.is_file():
                    raise OSError("a pipe, a device or a dangling link")
                with Image.open(path) as image:
                    images[kept] = square_pixels(ImageOps.exif_transpose(image), image_size, channels)
                kept += 1
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001  whatever Pillow raises on a damaged file
                reason = str(error).replace(repr(str(path)), "it")[:80]
                left_out.setdefault(reason, []).append(os.path.relpath(path, folder))
    print(f"data    {kept} of {len(paths)} pictures in {folder} are taken")
    for reason, names in left_out.items():
        print(f"data    {len(names)} left out, {reason}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}")
    if not kept:
        fail(f"--dataset folder: no image in '{folder}' ({' '.join(sorted(kinds))}); name your folder with --data-dir")
    return torch.from_numpy(images[:kept]), torch.zeros(kept, dtype=torch.long)


def square_pixels(image, image_size, channels):
    """The centred square of a Pillow image as uint8 [channels, image_size, image_size]; transparency becomes white.

    Raises ValueError where it is not known which number is white: floats, more than 16 bits, or 16 bits hardly used.
    """
    if image.mode[0] in "FI":
        numbers = np.asarray(image)
        if image.mode == "F" or numbers.min() < 0 or not 4096 <= numbers.max() < 65536:
            raise ValueError("numbers of no known range; convert it to 8 bits")
        image = Image.fromarray((numbers // 256).astype(np.uint8))  # 16 bits, which Pillow would cut off at 255
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert({1: "L", 3: "RGB"}[channels])
    pixels = np.asarray(ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS))
    return pixels.reshape(image_size, image_size, channels).transpose(2, 0, 1)


# ---------------------------------------------------------------------------------------------
# 5  Scores
# ---------------------------------------------------------------------------------------------

SCORES = {  # name in metrics.json and log.jsonl: title in the table, format, what is best
    "IS": ("Inception Score", ".3f", "high, at most 10"), "FD": ("Frechet distance", ".3f", "low"),
    "precision": ("precision", ".3f", "high: samples look real (void if recall is near 0)"),
    "recall": ("recall", ".3f", "high: samples vary as the data do"),
    "classes": ("classes covered", "g", "10"), "modes": ("modes captured", "g", "all"),
    "high_quality": ("samples within 3 sigma", ".3f", "as the perfect sampler"),
    "KL": ("KL divergence of the shares", ".4f", "low"), "as_asked": ("classes as asked for", ".3f", "high"),
}
FEATURES = 64  # of the classifier
NEIGHBOURS = 3  # k of precision and recall (arXiv 1904.06991)


def inception_score(probabilities):
    """3.2, 3.6: exp(mean_i KL(p_i || mean of p)) of probabilities p [N, classes] (arXiv 1606.03498): 1 to classes.

    It falls when classes are lost or unclear, not when all images of a class are alike (erratum 48). What real
    images score depends on the classifier (erratum 47).
    """
    p = probabilities.double()
    return torch.special.xlogy(p, p / p.mean(0).clamp(min=1e-300)).sum(1).mean().exp().item()


def frechet_distance(features, reference):
    """3.2, 3.6: ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) for features [N, D] and [M, D], N, M >= 2.

    arXiv 1706.08500; m and S: mean and covariance. It is the square of a distance, between the Gaussians fitted to
    the features (erratum 50).
    """
    (m1, s1), (m2, s2) = ((part.mean(0), part.T.cov()) for part in (features.double(), reference.double()))
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

    features, reference = features.double(), reference.double()
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
    """make_classifier's network after three epochs of uint8 images [N, 1, 28, 28] and labels [N].

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
    return network


@torch.enable_grad()
@torch.random.fork_rng(devices=[])  # the random numbers of a training are left alone
def load_classifier(name, images, labels):
    """The classifier for these data, in eval mode; trained once, then kept in the user's cache folder."""
    key = zlib.crc32(labels.numpy(), zlib.crc32(images.numpy()))
    path, network = build.cache_folder() / f"classifier-2-{name}-{key:08x}.pt", make_classifier()  # 2: of the recipe
    try:
        network.load_state_dict(torch.load(path, weights_only=True))
    except Exception:  # noqa: BLE001  there is none, or a damaged one
        tqdm.write(f"scores  training a classifier of {name}, once, in about a minute")
        network = train_classifier(images, labels)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, lambda file: torch.save(network.state_dict(), file))
        except OSError as error:
            tqdm.write(f"scores  the classifier is not kept: {error}")
    return network.eval()


def mixture_scores(points, centres, sigma):
    """演習問題2: PacGAN's scores (sec. 4.1 of arXiv 1712.04086) of points [N, 2] for Gaussians around centres [K, 2].

    A point counts for its nearest centre if it lies within 3 sigma of it; one such point captures a mode. KL is
    that of the counts from K equal shares, None if no point counts.
    """
    distance, nearest = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    counts = nearest[distance < 3 * sigma].bincount(minlength=len(centres))
    return {"modes": (counts > 0).sum().item(), "high_quality": counts.sum().item() / len(points),
            "KL": divergence(counts, 1 / len(centres)), "counts": counts.tolist()}


class PointScorer:
    """Scores of a generator of points. Its floor is what a perfect sampler scores on average."""

    floor_name, count = "perfect sampler", 2500

    def __init__(self, args):
        self.mixture, modes = MIXTURES[args.dataset], len(MIXTURES[args.dataset][0])
        self.against = f"the {modes} Gaussians of {args.dataset}"
        within = 1 - math.exp(-9 / 2)  # chi-squared of two dimensions; KL: the bias of counts, to first order
        self.floor = {"modes": modes, "high_quality": within, "KL": (modes - 1) / (2 * self.count * within)}

    def __call__(self, pipeline):
        return mixture_scores(pipeline(pipeline.noise(self.count), None), *self.mixture)


class ImageScorer:
    """Scores of a generator of images: as many samples as there are test images, read by the classifier.

    Its floor: every sixth training image, which the classifier has not seen either, in the place of samples. Scores
    compare only where the floor is the same, for then the classifier is, too.
    """

    floor_name = "real images"

    def __init__(self, args):
        self.args, train, self.test = args, load_data(args), load_data(args, "test")
        held, self.count = torch.arange(len(train.samples)) % 6 == 5, len(self.test.samples)
        self.classifier = load_classifier(args.dataset, train.samples[~held], train.labels[~held])
        self.reference, reading = self.read(map(self.test.scaled, torch.arange(self.count).split(250)))
        right = (reading.argmax(1) == self.test.labels).double().mean().item()
        self.against = f"the test images of {args.dataset}, read by a classifier that is right on {right:.2%} of them"
        batches = map(train.scaled, held.nonzero()[:, 0].split(250))
        self.floor = self.compare(*self.read(batches), train.labels[held])

    @torch.no_grad()
    def read(self, batches):
        """Features [N, FEATURES] and class probabilities [N, 10] of batches of images in [-1, 1]."""
        features = []
        for images in batches:
            pixels = ((images.clamp(-1, 1) + 1) * 127.5).round() / 255  # 8 bits, as in a file
            if pixels.size(3) != 28:
                pixels = F.adaptive_avg_pool2d(pixels, 32)[:, :, 2:-2, 2:-2]  # back from `scaled`
            features.append(self.classifier[:-1](pixels.mean(1, keepdim=True)))  # the classifier reads grey values
        features = torch.cat(features)
        return features, self.classifier[-1](features).softmax(1)

    def compare(self, features, probabilities, labels):
        """The scores of samples that were read so, and of which these labels [N] were asked."""
        reading, shares = probabilities.argmax(1), self.test.labels.bincount(minlength=10) / self.count
        counts = reading.bincount(minlength=10)
        precision, recall = precision_recall(features, self.reference)
        covered = (counts >= 0.1 * shares * len(reading)) & (shares > 0)
        scores = {"IS": inception_score(probabilities), "FD": frechet_distance(features, self.reference),
                  "precision": precision, "recall": recall,
                  "classes": covered.sum().item(), "KL": divergence(counts, shares)}
        if self.args.classes:
            scores["as_asked"] = (reading == labels).double().mean().item()
        return {**scores, "counts": counts.tolist()}

    def __call__(self, pipeline):
        z, labels = pipeline.noise(self.count), self.test.labels  # the classes as often as in the data
        return self.compare(*self.read(map(pipeline, z.split(250), labels.split(250))), labels)


def make_scorer(args):
    """What scores the generators of this data set, any but images of your own."""
    return PointScorer(args) if args.dataset in MIXTURES else ImageScorer(args)


def report(scorer, epoch, scores, seed, path):
    """The scores of that epoch's generator beside their floor: a table on the terminal, and a JSON file."""
    columns = {f"epoch {epoch}": scores, scorer.floor_name: scorer.floor}
    lines = [f"scores  {scorer.count} samples against {scorer.against}",
             " " * 30 + "".join(f"{heading:>17}" for heading in columns)]
    for name, (title, form, best) in SCORES.items():
        if name in scores:
            cells = ["-" if column[name] is None else format(column[name], form) for column in columns.values()]
            lines.append(f"{title:30}{''.join(f'{cell:>17}' for cell in cells)}  {best}")
    lines += [f"{heading + ': counts':30}{' '.join(map(str, column['counts']))}"
              for heading, column in columns.items() if "counts" in column]
    tqdm.write("\n".join(lines))
    about = {"samples": scorer.count, "against": scorer.against, "seed": seed}
    write(path, json.dumps({"epoch": epoch, **scores, scorer.floor_name: scorer.floor, **about}, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------
# 6  Pictures
# ---------------------------------------------------------------------------------------------

@contextlib.contextmanager
def plain_style():
    """matplotlib under its own defaults: the user's backend, style, TeX and fonts are for the user's figures."""
    backend = os.environ.pop("MPLBACKEND", None)  # importing it fails where that one is not installed
    import matplotlib

    os.environ.update({"MPLBACKEND": backend} if backend else {})
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


@plain_style()
def save_picture(samples, columns, path, paths=False, title=None):
    """Write a PNG: images [N, C, H, W] in [-1, 1] as a grid (erratum 11), points [N, 2] as a scatter plot.

    With `paths`, each `columns` successive points are one path through the plane. title: a line of text over a grid.
    """
    from matplotlib.figure import Figure
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    if samples.dim() == 4:
        enlarged = F.interpolate(samples, scale_factor=max(1, 64 // samples.size(3)))
        grid = make_grid(enlarged, columns, padding=4, normalize=True, value_range=(-1, 1))
        image = to_pil_image(grid.mul_(255).add_(0.5).byte())
        if title:
            image = ImageOps.expand(image, (0, 28, 0, 0), "white")
            ImageDraw.Draw(image).text((4, 4), title, "black", ImageFont.load_default(16))
        return write(path, functools.partial(image.save, format="png"))
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))  # MIXTURES: within [-1, 1]
    for line in samples.split(columns) if paths else ():
        axes.plot(*line.T.numpy(), ".-")
    if not paths:
        axes.scatter(*samples.T.numpy(), s=3, alpha=0.5)
    write(path, functools.partial(figure.savefig, format="png"))


@plain_style()
def save_curves(history, plots, path):
    """Panels, four in a row, over the epochs of `history`: (title, quantities, {label: the value at convergence})."""
    from matplotlib.figure import Figure

    rows, columns = math.ceil(len(plots) / 4), min(4, len(plots))
    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    for index, (title, names, guides) in enumerate(plots, start=1):
        axes, values = figure.add_subplot(rows, columns, index, title=title, xlabel="epoch"), [0]
        for name in names:
            points = [(row["epoch"], row[name]) for row in history if row.get(name) is not None]  # scores: not in all
            axes.plot(*zip(*points), label=name, marker="." if len(points) < max(2, len(history)) else None)
            values += [abs(value) for _, value in points]
        for label, value in guides.items():
            axes.axhline(value, color="gray", linestyle="--", linewidth=1, label=label)
        if max(values) > 20 * (middle := np.median(values)) > 0:  # linear, the first epochs would dwarf all others
            axes.set_yscale("symlog", linthresh=middle)
            # No labels in the linear part but 0: they would overlap.
            axes.yaxis.set_major_formatter(lambda y, _, low=middle: f"{y:g}" if abs(y) >= low or y == 0 else "")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    write(path, functools.partial(figure.savefig, format="png"))


def save_film(samples, path):
    """A looping GIF of a run's pictures of its epochs, the last one shown longer."""
    pictures = sorted(samples.glob("epoch_*.png"), key=lambda picture: (len(picture.name), picture.name))
    frames = [Image.open(picture).convert("P", palette=Image.Palette.ADAPTIVE) for picture in pictures]
    write(path, lambda file: frames[0].save(file, format="gif", save_all=True, append_images=frames[1:], loop=0,
                                            duration=[250] * (len(frames) - 1) + [2000]))


# ---------------------------------------------------------------------------------------------
# 7  torchrun
# ---------------------------------------------------------------------------------------------
# Every process runs the same code with batches of its own, of --batch-size each; before each step of the training the
# gradients are averaged. All processes but the first, rank 0, are mute, write into a folder that is thrown away, and
# leave signals to rank 0: when it ends, they do.
PROCESSES = int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1
RANK = int(os.environ["RANK"]) if PROCESSES > 1 else 0


def join_torchrun(args):
    """Meet the other processes, before the networks are built; `args` become those of this process."""
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    if RANK == 0:
        load_data(args)  # perhaps a download, for which the others wait
    distributed.barrier()
    if RANK > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        args.output_dir, args.eval_interval = tempfile.mkdtemp(), 0
        args.resume = args.resume and shutil.copy(args.resume, args.output_dir)


def average_gradients(optimizer, *_):
    """Before each step of an optimizer: every gradient becomes its mean over the processes."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    flat = nn.utils.parameters_to_vector(gradients)
    distributed.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / PROCESSES, gradients)
