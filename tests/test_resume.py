"""A run that is killed at any moment goes on as if nothing had happened: weights, log and pictures, bit for bit.

    python tests/test_resume.py SCRIPT FOLDER SEED SIGNAL [SIGNAL ...]

trains a script twice, once undisturbed and once hit by these signals at random moments, each time in a process forked
from this one, which has imported everything and uses one thread. It is what the tests below start.
"""

import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, SCRIPTS, load_script  # puts common on the path

import common
from csrc import ops

CASES = {  # flags that bring every part of a checkpoint into play
    "01_vanilla_gan": ["--dataset", "digits", "--ema-decay", "0.9"],
    "02_dcgan": ["--dataset", "digits", "--batch-size", "8", "--eval-interval", "1"],
    "03_wgan_gp": ["--dataset", "ring", "--lr-decay", "0.7", "--eval-interval", "1"],
    "04_cgan": ["--dataset", "digits", "--batch-size", "32", "--ema-decay", "0.9"],
    "05_sn_label_smoothing": ["--dataset", "digits", "--batch-size", "8", "--label-smoothing", "random"],
    "06_stylegan_blocks": ["--dataset", "digits", "--batch-size", "8", "--width", "32", "--latent-dim", "8"]}


class Scorer:
    """The image scorer's place, without its classifier. The first epoch is the best."""

    count, against, about, floor_name, floor, curves = 9, "nothing", {}, "nothing", {"FD": 0.0}, [("distance", ["FD"])]

    def __call__(self, pipeline):
        distance = pipeline(*pipeline.latents(9)).mean().item()
        return {"FD": distance, "FD_held_out": float(common.Run.current.epoch)}


def train(script, folder, arguments, number=None, fatal=0, delay=0.0):
    """A training in a forked process, which the signal `number` hits `delay` seconds after its event number `fatal`.

    Events: quantities recorded, checkpoints packed, files flushed to the disk and renamed. Returns the exit code.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(folder / "output.txt", "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)
    events = []

    def watch(place, name):
        original = getattr(place, name)

        def call(*arguments, **options):
            events.append(name)
            if len(events) == fatal:
                threading.Timer(delay, os.kill, (os.getpid(), number)).start() if delay else os.kill(os.getpid(), number)
            return original(*arguments, **options)

        setattr(place, name, call)

    for place, name in ((common.Run, "record"), (torch, "save"), (os, "fsync"), (os, "replace")):
        watch(place, name)
    code = 1
    try:
        common.guarded(lambda: load_script(script).main(list(map(str, arguments))))
        (folder / "events.txt").write_text(str(len(events)))
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def rehearse(script, folder, seed, *signals):
    """The two trainings; prints how many of the signals came before the end."""
    torch.set_num_threads(1)
    common.draw_digits("train")
    if script == "02_dcgan":
        common.make_scorer = lambda args: Scorer()
    if script == "06_stylegan_blocks" and len(signals) < 10:
        load_script(script).STYLES.clear()  # slow to draw
    common.Run.SAVE_SECONDS = seed % 2 * 1000  # every second time a checkpoint after each step: kills fall on them
    rng, plain, torn, fell = random.Random(seed), folder / "plain", folder / "torn", 0
    plain.mkdir(), torn.mkdir()
    flags = ["--epochs", 3, "--max-batches", 4, "--eval-interval", 0, "--device", "cpu", *CASES[script], "--output-dir"]
    assert train(script, plain, [*flags, plain]) == 0, (plain / "output.txt").read_text()
    apart = 3 * int((plain / "events.txt").read_text()) // (2 * len(signals) + 2)  # the most events from one to the next
    code = None
    while code != 0:
        arguments = ["--resume", "--output-dir", torn] if list(torn.glob("0*/checkpoint.pt")) else [*flags, torn]
        number = signals[fell] if fell < len(signals) else None
        code = train(script, torn, arguments, *(number, rng.randint(1, apart), rng.choice([0, 0.05 * rng.random()])) if number else ())
        assert code in (0, number and (-number if number == signal.SIGKILL else 128 + number)), (torn / "output.txt").read_text()
        fell += code != 0
    print(fell)


if __name__ == "__main__":
    rehearse(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))


def content(folder):
    """Everything in a run's folder that must not differ, by name: tensors as bytes, the log without seconds, pictures."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            found |= {f"{name}:{key}": value for key, value in flat(torch.load(path, weights_only=True))}
        elif path.name == "log.jsonl":
            found[name] = [{key: value for key, value in json.loads(line).items() if key != "seconds"}
                           for line in path.read_text().splitlines()]
        elif path.is_file() and path.name != "options.json":
            found[name] = path.read_bytes()
    return found


def flat(value, name=""):
    """(name, leaf) pairs of nested dictionaries and lists, but for what a resumed run may have otherwise."""
    if isinstance(value, dict | list | tuple):
        for key, part in (value.items() if isinstance(value, dict) else enumerate(value)):
            if key not in ("options", "seconds"):
                yield from flat(part, f"{name}.{key}")
    else:
        yield name, value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("script", [name if name[:2] in ("03", "06") else pytest.param(name, marks=pytest.mark.slow)
                                    for name in SCRIPTS])
@pytest.mark.parametrize("seed, signals", [
    (2, [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]),
    *(pytest.param(seed, [number] * 20, marks=pytest.mark.slow) for number in (signal.SIGKILL, signal.SIGTERM) for seed in (3, 4))])
def test_killed_and_resumed(script, seed, signals, tmp_path):
    process = subprocess.run([sys.executable, __file__, script, *map(str, [tmp_path, seed, *map(int, signals)])], cwd=ROOT,
                             capture_output=True, text=True, timeout=1200, check=False)
    assert process.returncode == 0, process.stderr
    assert len(signals) / 2 <= int(process.stdout) <= len(signals), "a run may end before the last"
    *unfinished, last = sorted((tmp_path / "torn").glob("0*"))
    assert not any((folder / "checkpoint.pt").exists() for folder in unfinished), "but for those killed before their start"
    plain, torn = (content(folder) for folder in (next((tmp_path / "plain").glob("0*")), last))
    assert plain.keys() == torn.keys(), "no file is missing, none is left over"
    assert [name for name in plain if plain[name] != torn[name]] == []
    assert len(plain["log.jsonl"]) == 3 and any(name.endswith("final.png") for name in plain)
    assert plain.get("best.pt:.epoch") == (1 if script == "02_dcgan" else None)


def run(script, *arguments):
    return load_script(script).main(list(map(str, arguments)))


SHORT = ["--dataset", "gaussians", "--epochs", 2, "--max-batches", 3, "--eval-interval", 0, "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def quick_figures():
    """Plots in this process are small pictures of nothing: they take most of the time of so short a run."""
    def save(figure, path):
        Image.new("L", (8, 8)).save(content := io.BytesIO(), "png")
        common.write_whole(path, content.getvalue())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save_figure", save)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of 03, complete."""
    parent = tmp_path_factory.mktemp("runs")
    run("03_wgan_gp", *SHORT, "--output-dir", parent)
    return parent / "03_wgan_gp-gaussians-0001"


def refused(capsys, script, *arguments, code=2):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(script, *arguments)
    assert stop.value.code == code
    line, = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("flags, wrong", [
    (["--lr-g", 0.5], "--lr-g 0.5 is not the run's, which has 0.001"), (["--batch-size", 9], "--batch-size 9 is not the run's, which has 256"),
    (["--epochs", 1], "--epochs 1 is less than the run's 2"), ([], "complete after 2 epochs; a larger --epochs trains on"),
    (["--kernels", "reference"], "--kernels reference is not the run's, which has fused"),
    (["--generate", 3], "--generate needs a trained generator"), (["--from", "no"], "--from draws and --resume trains; give one")])
def test_what_a_resumed_run_may_not_change(finished, capsys, flags, wrong):
    before = {path: path.read_bytes() for path in finished.rglob("*.*")}
    assert wrong in refused(capsys, "03_wgan_gp", "--resume", finished, *flags)
    assert {path: path.read_bytes() for path in finished.rglob("*.*")} == before


def test_resume_needs_the_run_and_its_surroundings(finished, tmp_path, capsys, monkeypatch):
    assert "there is no run of 03_wgan_gp in" in refused(capsys, "03_wgan_gp", "--resume", "--output-dir", tmp_path)
    for name in (tmp_path / "no", ""):      # "": a variable of the shell that is not set
        assert "does not exist" in refused(capsys, "03_wgan_gp", "--resume", name)
    assert "leave out --output-dir" in refused(capsys, "03_wgan_gp", "--resume", finished, "--output-dir", tmp_path)
    assert "was trained by 03_wgan_gp.py" in refused(capsys, "01_vanilla_gan", "--resume", finished)
    more = ["--resume", finished, "--epochs", 3]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        assert re.search(r"threads 77 is not the run's, which has \d+.*; set OMP_NUM_THREADS=\d+$", refused(capsys, "03_wgan_gp", *more))
    with monkeypatch.context() as patch:
        patch.setattr(common, "RANKS", 2)
        assert "ranks 2 is not the run's, which has 1" in refused(capsys, "03_wgan_gp", *more)
    with monkeypatch.context() as patch:
        patch.setitem(common.MIXTURES, "gaussians", (common.MIXTURES["gaussians"][0], 0.051))
        assert "are not those that the run was trained on" in refused(capsys, "03_wgan_gp", *more)
        assert "is not what the run was trained on" in refused(capsys, "03_wgan_gp", "--from", finished, "--evaluate")
    with monkeypatch.context() as patch:
        patch.setattr(ops, "choose", lambda wanted, device: (_ for _ in ()).throw(common.build.Unavailable("none")))
        assert "no fused kernels: none" in refused(capsys, "03_wgan_gp", *more)
    elsewhere = tmp_path / "03_wgan_gp-gaussians-0001"
    shutil.copytree(finished, elsewhere)
    checkpoint = torch.load(elsewhere / "checkpoint.pt", weights_only=True)
    checkpoint["options"]["device"] = "mps"
    torch.save(checkpoint, elsewhere / "checkpoint.pt")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert "the run's --device mps: this torch" in refused(capsys, "03_wgan_gp", "--resume", elsewhere, "--epochs", 3)
    lock = common.only_here(finished)
    assert f"another process is training in {finished}" in refused(capsys, "03_wgan_gp", *more)
    os.close(lock)


def test_labels_count_where_there_are_classes():
    data = common.load_data("gaussians", "unused")
    other = data._replace(labels=data.labels.roll(1))
    assert data.digest() == other.digest() and data.digest(8) != other.digest(8)


def test_the_newest_run_goes_on_for_more_epochs(tmp_path, monkeypatch, capsys):
    """The one that was saved last, with its best.pt, which is that of the first epoch."""
    monkeypatch.setattr(common, "make_scorer", lambda args: Scorer())
    constant = ["--eval-interval", 1, "--lr-decay", 0, "--output-dir", tmp_path]  # rates that fall to the end fall faster in a shorter training
    run("03_wgan_gp", *SHORT, *constant)
    newest, older = (tmp_path / f"03_wgan_gp-gaussians-000{number}" for number in (1, 2))
    shutil.copytree(newest, older)
    os.utime(older / "checkpoint.pt", (0, 0))
    notes = newest / "my notes"
    notes.mkdir()
    for file in ("log.jsonl.1.tmp", "samples/final.png.1.tmp", "my notes/a.b.1.tmp"):   # 1: a number that is in use again
        (newest / file).write_text("half")
    run("03_wgan_gp", "--resume", "--epochs", 4, "--output-dir", tmp_path)
    assert [path.parent for path in newest.rglob("*.tmp")] == [notes]
    shutil.rmtree(notes)
    assert f"{newest.name}: 4 epochs of 3 generator steps, resumed after step 6" in capsys.readouterr().out
    run("03_wgan_gp", *SHORT[:2], "--epochs", 4, *SHORT[4:], *constant)
    resumed, whole = (content(tmp_path / f"03_wgan_gp-gaussians-000{number}") for number in (1, 3))
    assert len(resumed["log.jsonl"]) == 4 and resumed["best.pt:.epoch"] == 1 and {name for name in whole if whole[name] != resumed.get(name)} == set()


@pytest.mark.parametrize("nth, error", [*((nth, OSError(28, "No space left on device")) for nth in (2, 5, 8, 12, 15)),
                                        (7, OSError(30, "Read-only file system"))])
def test_a_full_disk_costs_nothing_that_exists(finished, tmp_path, monkeypatch, capsys, nth, error):
    """The nth file cannot be written: one line, code 1, the files before it whole, and the run goes on once there is room."""
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > nth:
            raise error
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = refused(capsys, "03_wgan_gp", *SHORT, "--output-dir", tmp_path, code=1)
    assert re.search(rf"03_wgan_gp-gaussians-0001/\S+ cannot be written \({error.strerror}\)$", line)
    assert not list(tmp_path.rglob("*.tmp"))
    folder = tmp_path / "03_wgan_gp-gaussians-0001"
    if not folder.exists():
        return  # nothing had been trained
    assert nth > 3
    monkeypatch.setattr(torch, "__version__", torch.__version__ + ".1")
    elsewhere = folder.rename(tmp_path / "elsewhere")  # as a run that was copied to another machine, with another torch
    run("03_wgan_gp", "--resume", elsewhere)
    assert "so far: what follows is not the same to the bit" in capsys.readouterr().out
    assert content(elsewhere) == content(finished)


def test_the_run_s_folder_is_deleted(tmp_path, monkeypatch, capsys):
    steps = common.Run.steps

    def deleting(run):
        yield from steps(run)
        common.shutil.rmtree(run.folder)

    monkeypatch.setattr(common.Run, "steps", deleting)
    line = refused(capsys, "03_wgan_gp", *SHORT, "--output-dir", tmp_path, code=1)
    assert line.endswith("log.jsonl cannot be written (No such file or directory)")


def test_two_processes_in_one_output_folder(tmp_path):
    processes = [subprocess.Popen([sys.executable, "03_wgan_gp.py", *map(str, SHORT), "--output-dir", str(tmp_path)], cwd=ROOT,
                                  stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (content(folder) for folder in sorted(tmp_path.iterdir()))
    assert first == second


def broken(monkeypatch, network, after):
    """Weights of `network` become NaN with the generator's step number `after`; the losses do not show it."""
    module, steps = load_script("03_wgan_gp"), []
    step = module.generator_step

    def call(generator, critic, optimizer, z):
        quantities = step(generator, critic, optimizer, z)
        steps.append(z)
        if len(steps) == after:
            with torch.no_grad():
                next({"generator": generator, "critic": critic}[network].parameters())[0] = torch.nan
        return quantities

    monkeypatch.setattr(module, "generator_step", call)


@pytest.mark.parametrize("network", ["generator", "critic"])
@pytest.mark.parametrize("after, noticed, good", [(6, 6, 3), (3, 3, 0)])
def test_nan_never_replaces_a_good_checkpoint(tmp_path, monkeypatch, capsys, network, after, noticed, good):
    broken(monkeypatch, network, after)
    line = refused(capsys, "03_wgan_gp", *SHORT, "--output-dir", tmp_path, code=1)
    folder = tmp_path / "03_wgan_gp-gaussians-0001"
    assert f"the state of {network} is no longer finite in step {noticed}, epoch {noticed // 3}; try smaller --lr-g and --lr-d" in line
    assert f"(the last good checkpoint, of step {good}, is in {folder})" in line
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert kept["step"] == good and all(value.isfinite().all() for value in kept["generator"].values())


def test_nan_is_noticed_within_a_hundred_steps(tmp_path, monkeypatch, capsys):
    broken(monkeypatch, "generator", 5)
    line = refused(capsys, "03_wgan_gp", *SHORT[:4], "--max-batches", 150, "--batch-size", 4, "--eval-interval", 0,
                   "--output-dir", tmp_path, code=1)
    assert "is no longer finite in step 100, epoch 1" in line


def test_growth_beyond_all_sense_is_warned_of_once(tmp_path, monkeypatch, capsys):
    losses = iter(range(10**6, 10**7, 10**5))
    monkeypatch.setattr(load_script("03_wgan_gp"), "generator_step", lambda *rest: {"loss_G": torch.tensor(float(next(losses)))})
    run("03_wgan_gp", *SHORT[:2], "--epochs", 4, *SHORT[4:], "--output-dir", tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert lines == ["warning loss_G is 1.4e+06 and growing in step 6; try smaller --lr-g and --lr-d"]


def test_from_refuses_nan(finished, tmp_path, capsys):
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    next(iter(checkpoint["average"].values()))[0] = np.inf  # what --from samples
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    assert "has weights that are no finite numbers" in refused(capsys, "03_wgan_gp", "--from", tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step(number, tmp_path, monkeypatch, capsys):
    """128 + its number, a checkpoint of that very step, the curves, the command that resumes; a second one ends at once."""
    module = load_script("03_wgan_gp")
    step, calls = module.generator_step, []

    def signalled(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            common.interrupt(number, None)
            assert signal.getsignal(number) == signal.SIG_DFL
        return step(*arguments)

    before = signal.getsignal(number)
    monkeypatch.setattr(module, "generator_step", signalled)
    try:
        with pytest.raises(SystemExit) as stop:
            run("03_wgan_gp", *SHORT, "--output-dir", tmp_path)
    finally:
        signal.signal(number, before)
    folder = tmp_path / "03_wgan_gp-gaussians-0001"
    assert stop.value.code == 128 + number and torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 5
    assert capsys.readouterr().out.endswith(f"interrupted after 1 epochs; to go on: python 03_wgan_gp.py --resume {folder}\n")
    assert (folder / "curves.png").exists() and len(calls) == 5


def test_interrupted_before_the_first_step_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "save_picture", lambda *arguments, **options: common.interrupt(signal.SIGTERM, None))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            run("03_wgan_gp", *SHORT, "--output-dir", tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == []


def script_in_shell(command, **environment):
    """Exit code, output and errors of a script in a shell command, {run} being 03 with SHORT."""
    run = f"{sys.executable} 03_wgan_gp.py {' '.join(map(str, SHORT))}"
    return subprocess.run(["bash", "-c", "set -o pipefail; " + command.format(run=run, python=sys.executable)], cwd=ROOT, check=False,
                          capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


@pytest.mark.parametrize("redirection, errors", [("| head -1", 1), ("> /dev/full", 1), (">&- 2>&- <&-", 0)])
def test_a_lost_stream_does_not_end_the_training(tmp_path, redirection, errors):
    """Nor does a name beyond the terminal's encoding."""
    folder = tmp_path / "敵対的"
    process = script_in_shell(f"{{run}} --output-dir {folder} {redirection}", PYTHONIOENCODING="ascii")
    assert process.returncode == 0 and len(process.stderr.splitlines()) == errors, process.stderr
    assert torch.load(folder / "03_wgan_gp-gaussians-0001" / "checkpoint.pt", weights_only=True)["step"] == 6


def test_help_without_a_stream():
    assert script_in_shell("{python} 03_wgan_gp.py --help >&-").stderr == ""


def test_a_folder_that_looks_like_a_flag(tmp_path, monkeypatch, capsys):
    """From another folder than that of the scripts, too: the command that it prints works there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["../a copy/03_wgan_gp.py"])
    run("03_wgan_gp", *SHORT, "--output-dir=-x/a b")
    command = capsys.readouterr().out.partition("more    python '../a copy/03_wgan_gp.py' ")[2]
    run("03_wgan_gp", *shlex.split(command))
    assert (tmp_path / "-x" / "a b" / "03_wgan_gp-gaussians-0001" / "samples" / "generated-64-seed0.png").exists()


def test_several_processes_go_on_as_several(monkeypatch):
    monkeypatch.setattr(common, "RANKS", 2)
    run = Namespace(folder="runs/a", args=Namespace(script="03_wgan_gp"))
    assert common.Run._command(run, "--resume") == "torchrun --nproc-per-node 2 03_wgan_gp.py --resume runs/a"
    assert common.Run._command(run, "--from") == "python 03_wgan_gp.py --from runs/a"


def test_a_full_pipe_that_does_not_block_is_waited_for():
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        with open(os.dup(write), "wb", buffering=0) as fill:
            while fill.write(bytes(1000)) or fill.write(b"1"):
                pass
        with common.Output(write, "w", closefd=False) as output:
            reader = threading.Timer(0.1, os.read, (read, 2**20))
            reader.start()
            assert output.write(b"epoch") == 5
            reader.join()
    finally:
        os.close(read)
        os.close(write)


def test_too_little_memory_is_no_damage(finished, monkeypatch):
    """On the CPU torch raises a RuntimeError; `guarded` makes the line of it."""
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes")
    load, calls = common.load_checkpoint, []

    def too_large(path):
        calls.append(path)
        if len(calls) > loads:
            raise error
        return load(path)

    monkeypatch.setattr(common, "load_checkpoint", too_large)
    for loads, flags in [(0, ["--from", finished]), (1, ["--from", finished]), (1, ["--resume", finished, "--epochs", 3])]:
        calls.clear()
        with pytest.raises(RuntimeError, match="allocate"):
            run("03_wgan_gp", *flags)


@pytest.mark.parametrize("seconds", [0, 0.5])
def test_ctrl_c_while_torch_is_imported(seconds):
    """At its beginning, which is when its libraries are loaded, and later."""
    process = subprocess.Popen([sys.executable, "03_wgan_gp.py", "--dataset", "gaussians"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # noqa: PLW1509
    while "libtorch" not in Path("/proc", str(process.pid), "maps").read_text():
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == -signal.SIGINT


def test_a_fault_of_ours_says_so(tmp_path):
    """A traceback that does appear comes with the command to report."""
    program = "import common, sys; sys.argv = ['03_wgan_gp.py', '--seed', '3']; common.guarded(lambda: 1 / 0)"
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 1 and "ZeroDivisionError" in process.stderr
    assert process.stderr.endswith("this is a fault of these scripts; please report the lines above, with the command python 03_wgan_gp.py --seed 3\n")


LARGE = [("06_stylegan_blocks", ["--latent-dim", "20000"], "--latent-dim"), ("06_stylegan_blocks", ["--width", "9999"], "--width"),
         ("02_dcgan", ["--batch-size", "60000"], "--batch-size"), ("03_wgan_gp", ["--critic", "conv", "--batch-size", "60000"], "--batch-size"),
         ("05_sn_label_smoothing", ["--batch-size", "20000", "--minibatch-discrimination", "on"], "--batch-size")]


@pytest.mark.parametrize("script, flags, advice", [case if case[0] == "05_sn_label_smoothing" else
                                                   pytest.param(*case, marks=pytest.mark.slow) for case in LARGE])
def test_too_little_memory_is_one_line(script, flags, advice, tmp_path):
    """Where 4 GB are free, in place of what this machine has: refused by the system before its killer comes."""
    program = ("import runpy, sys; sys.path.insert(0, '.'); import common; common.free_memory = lambda: 4 * 10**9; "
               f"sys.argv = ['{script}.py', *{flags}, '--dataset', 'digits', '--output-dir', '{tmp_path}']; "
               f"runpy.run_path('{script}.py', run_name='__main__')")
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert process.returncode == 2, process.stderr
    line, = process.stderr.splitlines()
    assert re.search(rf"error: there is too little memory( for another [\d.]+ \w+)?; lower {advice}$", line)
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_in_mid_run(tmp_path, monkeypatch, capfd):
    """1: the last checkpoint is good; too little from the start is 2."""
    module = load_script("03_wgan_gp")
    step, calls = module.generator_step, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return step(*arguments)

    monkeypatch.setattr(module, "generator_step", failing)
    monkeypatch.setattr(common, "limit_memory", lambda: None)
    for name in ("stdout", "stderr"):  # put back what `guarded` replaces
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with pytest.raises(SystemExit) as stop:
        common.guarded(lambda: run("03_wgan_gp", *SHORT, "--output-dir", tmp_path))
    assert stop.value.code == 1 and capfd.readouterr().err.endswith("error: there is too little memory; lower --batch-size\n")


@pytest.mark.slow
def test_two_thousand_steps_take_no_more_memory_or_files(tmp_path, monkeypatch):
    """With a checkpoint every tenth step."""
    seen, steps = {}, common.Run.steps

    def watched(run):
        for step, _ in enumerate(steps(run), start=1):
            yield
            run.saved = -1e9 if step % 10 == 0 else run.saved
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen[step] = pages * 4096, len(os.listdir("/proc/self/fd"))

    monkeypatch.setattr(common.Run, "steps", watched)
    run("04_cgan", "--dataset", "digits", "--epochs", 1, "--max-batches", 2000, "--batch-size", 8, "--eval-interval", 0, "--output-dir", tmp_path)
    assert len(seen) == 2000 and seen[2000][0] - seen[200][0] < 8e6 and seen[2000][1] == seen[200][1]
