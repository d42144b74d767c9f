"""A run that is killed at any moment goes on as if nothing had happened: weights, log and pictures, bit for bit.

    python tests/test_resume.py SCRIPT FOLDER SEED SIGNAL [SIGNAL ...]

trains a script twice, once undisturbed and once hit by these signals at random moments, each time in a process forked
from this one, which has imported everything and uses one thread. It is what the first test starts.
"""

import functools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from conftest import ROOT, SCRIPTS, load_script  # puts common on the path

import common

CASES = {  # flags that bring every part of a checkpoint into play
    "01_vanilla_gan": ["--dataset", "digits", "--variant", "two-logit", "--ema-decay", "0.9"],
    "02_dcgan": ["--dataset", "digits", "--batch-size", "8"],
    "03_wgan_gp": ["--dataset", "ring", "--lr-decay", "0.7", "--eval-interval", "1"],
    "04_cgan": ["--dataset", "digits", "--batch-size", "32", "--ema-decay", "0.9"],
    "05_sn_label_smoothing": ["--dataset", "digits", "--batch-size", "8", "--label-smoothing", "random"],
    "06_stylegan_blocks": ["--dataset", "digits", "--batch-size", "8", "--width", "32", "--latent-dim", "8"]}


def save_nothing(figure, file, format):
    """In place of Figure.savefig, which takes most of the time of a short run."""
    Image.new("L", (8, 8)).save(file, format)


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
    events, hit = [], functools.partial(os.kill, os.getpid(), number)

    def watch(place, name):
        original = getattr(place, name)

        def call(*arguments, **options):
            events.append(name)
            if len(events) == fatal:
                threading.Timer(delay, hit).start() if delay else hit()
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
    images = torch.randint(256, (600, 1, 28, 28), dtype=torch.uint8), torch.arange(600) % 10
    common.draw_digits = lambda split: images
    if len(signals) < 10:  # most of the time goes into pictures
        Figure.savefig = save_nothing
        getattr(load_script(script), "STYLES", {}).clear()
    common.Run.SAVE_SECONDS = seed % 2 * 1000  # every second time a checkpoint after each step: kills fall on them
    rng, plain, torn, fell = random.Random(seed), folder / "plain", folder / "torn", 0
    plain.mkdir(), torn.mkdir()
    flags = ["--epochs", 3, "--max-batches", 4, "--eval-interval", 0, "--device", "cpu", *CASES[script], "--output-dir"]
    assert train(script, plain, [*flags, plain]) == 0, (plain / "output.txt").read_text()
    apart = 3 * int((plain / "events.txt").read_text()) // (2 * len(signals) + 2)  # events between two signals, at most
    code = None
    while code != 0:
        arguments = ["--resume", "--output-dir", torn] if list(torn.glob("0*/checkpoint.pt")) else [*flags, torn]
        number = signals[fell] if fell < len(signals) else None
        code = train(script, torn, arguments, number, rng.randint(1, apart) if number else 0,
                     rng.choice([0, 0.05 * rng.random()]))
        expected = {None: 0, signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}[number]
        assert code in (0, expected), (torn / "output.txt").read_text()
        fell += code != 0
    print(fell)


if __name__ == "__main__":
    rehearse(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))


def content(folder):
    """What must not differ, by name of the file: bytes, the log without seconds, the leaves of the checkpoint."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
    found["log.jsonl"] = [{**json.loads(line), "seconds": 0} for line in found["log.jsonl"].splitlines()]
    found["checkpoint.pt"] = dict(flat(torch.load(folder / "checkpoint.pt", weights_only=True)))
    del found["options.json"]
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
    *(pytest.param(seed, [number] * 15, marks=pytest.mark.slow)
      for seed, number in ((3, signal.SIGKILL), (4, signal.SIGKILL), (3, signal.SIGTERM)))])
def test_killed_and_resumed(script, seed, signals, tmp_path):
    arguments = __file__, script, *map(str, [tmp_path, seed, *map(int, signals)])
    process = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    fell = int(process.stdout)
    print(f"{fell} of {len(signals)} signals came before the end")
    assert len(signals) / 2 <= fell <= len(signals)
    *unfinished, last = sorted((tmp_path / "torn").glob("0*"))
    assert not any((folder / "checkpoint.pt").exists() for folder in unfinished), "killed before their start"
    plain, torn = (content(folder) for folder in (next((tmp_path / "plain").glob("0*")), last))
    assert plain.keys() == torn.keys(), "no file is missing, none is left over"
    assert [name for name in plain if plain[name] != torn[name]] == []
    assert len(plain["log.jsonl"]) == 3 and "samples/final.png" in plain


SHORT = ["--dataset", "gaussians", "--epochs", 2, "--max-batches", 3, "--eval-interval", 0, "--device", "cpu"]
NAME = "03_wgan_gp-gaussians-0001"  # the folder of its first run


def run(script, *arguments):
    return load_script(script).main(list(map(str, arguments)))


@pytest.fixture(scope="module", autouse=True)
def quick_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_nothing)
        yield


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch):
    """No run yet; and afterwards the handlers of signals that `guarded` has replaced."""
    monkeypatch.setattr(common.Run, "current", None)
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of 03, complete."""
    parent = tmp_path_factory.mktemp("runs")
    run("03_wgan_gp", *SHORT, "--output-dir", parent)
    return parent / NAME


@pytest.fixture
def ended(capsys):
    """Call a script as a user does: it must end with this code and one line on stderr, which is returned."""
    def call(script, *arguments, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            common.guarded(lambda: run(script, *arguments))
        assert stop.value.code == code
        line, = capsys.readouterr().err.splitlines()
        return line
    return call


def at_step(monkeypatch, number, act):
    """In 03's generator step number `number` act(generator, critic) is called, before what the step returns."""
    module, calls = load_script("03_wgan_gp"), []
    step = module.generator_step

    def call(generator, critic, optimizer, z):
        quantities = step(generator, critic, optimizer, z)
        calls.append(z)
        return (len(calls) == number and act(generator, critic)) or quantities

    monkeypatch.setattr(module, "generator_step", call)
    return calls


def test_what_resume_refuses(finished, tmp_path, ended):
    before = {path: path.read_bytes() for path in finished.rglob("*.*")}
    for flags, key in ((["--lr-g", 0.5, "--batch-size", 9], "--batch-size, --lr-g"), (["--generate", 3], "--generate"),
                       ([], "complete after 2 epochs")):
        assert key in ended("03_wgan_gp", "--resume", finished, *flags)
    assert "no run of 03_wgan_gp" in ended("03_wgan_gp", "--resume", "--output-dir", tmp_path)
    assert "is not there" in ended("03_wgan_gp", "--resume", tmp_path / "no")
    assert "was trained by 03_wgan_gp" in ended("01_vanilla_gan", "--resume", finished)
    torch.save({"options": {"script": "03_wgan_gp"}}, tmp_path / "old.pt")
    assert "an earlier version" in ended("03_wgan_gp", "--resume", tmp_path / "old.pt")
    assert {path: path.read_bytes() for path in finished.rglob("*.*")} == before


def test_resume_needs_the_run_s_surroundings(finished, tmp_path, ended, monkeypatch, capsys):
    """As many samples; other threads or another torch are only told."""
    more = ["--resume", shutil.copytree(finished, tmp_path / "copy"), "--epochs", 3]
    with monkeypatch.context() as patch:
        patch.setattr(common, "draw_mixture", lambda name, split: (torch.zeros(999, 2), torch.zeros(999)))
        assert "999 training samples, the run has 60000" in ended("03_wgan_gp", *more)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    run("03_wgan_gp", *more)
    assert "not the same to the bit" in capsys.readouterr().out


def test_the_newest_run_goes_on_for_more_epochs(tmp_path, capsys):
    """And is then what it would be, had it been asked for that many from the start."""
    flags = [*SHORT, "--eval-interval", 1, "--lr-decay", 0]  # rates that fall to the end fall faster in a shorter run
    run("03_wgan_gp", *flags, "--output-dir", tmp_path)
    older = shutil.copytree(tmp_path / NAME, tmp_path / NAME.replace("1", "2"))
    os.utime(older / "checkpoint.pt", (0, 0))
    run("03_wgan_gp", "--resume", "--epochs", 4, "--output-dir", tmp_path)
    assert f"{NAME}: 4 epochs of 3 generator steps, resumed after step 6" in capsys.readouterr().out
    run("03_wgan_gp", *flags, "--epochs", 4, "--output-dir", tmp_path / "whole")
    resumed = content(tmp_path / NAME)
    assert len(resumed["log.jsonl"]) == 4 and resumed == content(tmp_path / "whole" / NAME)


@pytest.mark.parametrize("files", [1, 4, 7, 15])
def test_a_full_disk_costs_nothing_that_exists(finished, tmp_path, monkeypatch, ended, files):
    """After so many files: one line, no half of a file, and the run goes on once there is room."""
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > files:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = ended("03_wgan_gp", *SHORT, "--output-dir", tmp_path, code=1 if files > 3 else 2)
    folder = tmp_path / NAME
    assert str(folder) in line and line.endswith("cannot be written (No space left on device)")
    assert len([path for path in folder.rglob("*") if path.is_file()]) <= files and not list(folder.rglob("*.tmp"))
    if files > 3:  # the first checkpoint is the fourth file
        run("03_wgan_gp", "--resume", folder)
        assert content(folder) == content(finished)


def test_an_output_folder_that_cannot_be_made(tmp_path, ended):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in ended("03_wgan_gp", *SHORT, "--output-dir", tmp_path / "file")


def test_the_run_s_folder_is_deleted(tmp_path, monkeypatch, ended):
    at_step(monkeypatch, 4, lambda *networks: shutil.rmtree(tmp_path / NAME))
    line = ended("03_wgan_gp", *SHORT, "--output-dir", tmp_path, code=1)
    assert "cannot be written (No such file or directory)" in line and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("allocate", [lambda: bytearray(2**62), lambda: torch.empty(2**58)])
def test_too_little_memory(allocate, finished, tmp_path, monkeypatch, ended):
    """Python's allocator and PyTorch's: the last checkpoint is good."""
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda *networks: allocate())
        assert "too little memory" in ended("03_wgan_gp", *SHORT, "--output-dir", tmp_path, code=1)
    run("03_wgan_gp", "--resume", tmp_path / NAME)
    assert content(tmp_path / NAME) == content(finished)


@pytest.mark.parametrize("bad, step, noticed, good", [("generator", 2, 3, 0), ("critic", 6, 6, 3), ("loss", 5, 6, 3)])
def test_nan_never_replaces_a_good_checkpoint(tmp_path, monkeypatch, ended, bad, step, noticed, good):
    def break_it(generator, critic):
        if bad == "loss":
            return {"loss_G": torch.tensor(torch.nan)}
        with torch.no_grad():  # the losses of this step do not show it
            next({"generator": generator, "critic": critic}[bad].parameters())[0] = torch.nan

    at_step(monkeypatch, step, break_it)
    line = ended("03_wgan_gp", *SHORT, "--output-dir", tmp_path, code=1)
    assert f"no longer finite in step {noticed}" in line and str(tmp_path / NAME) in line
    kept = torch.load(tmp_path / NAME / "checkpoint.pt", weights_only=True)
    assert kept["step"] == good and all(value.isfinite().all() for value in kept["generator"].values())
    assert (tmp_path / NAME / "log.jsonl").exists() == (good > 0), "NaN is no JSON"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(number, finished, tmp_path, monkeypatch, ended):
    """With a checkpoint of that very step, 128 + its number, and a command that resumes from wherever one is."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        calls = at_step(patch, 5, lambda *networks: os.kill(os.getpid(), number))
        line = ended("03_wgan_gp", *SHORT, "--output-dir", "a b", code=128 + number)
    folder = tmp_path / "a b" / NAME
    assert len(calls) == 5 and torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 5
    before, _, command = line.partition("python ")
    script, *arguments = shlex.split(command)
    assert before.startswith("interrupted after 1 epochs") and Path(script).samefile(ROOT / "03_wgan_gp.py")
    run("03_wgan_gp", *arguments)
    assert content(folder) == content(finished)


def test_a_signal_outside_a_step_or_a_second_one_ends_at_once(tmp_path, monkeypatch, ended):
    with monkeypatch.context() as patch:
        patch.setattr(common, "save_picture", lambda *arguments, **options: os.kill(os.getpid(), signal.SIGINT))
        assert ended("03_wgan_gp", *SHORT, "--output-dir", tmp_path / "a", code=130) == "interrupted"
    assert "no run" in ended("03_wgan_gp", "--resume", "--output-dir", tmp_path / "a"), "nothing had been trained"
    calls = at_step(monkeypatch, 5, lambda *networks: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert "--resume" in ended("03_wgan_gp", *SHORT, "--output-dir", tmp_path, code=130)
    assert len(calls) == 5 and torch.load(tmp_path / NAME / "checkpoint.pt", weights_only=True)["step"] == 3


def test_a_closed_pipe_ends_the_run_like_ctrl_c(tmp_path):
    """As when the training's output goes through "| head"."""
    flags = ["--dataset", "gaussians", "--epochs", "9999", "--max-batches", "1", "--sample-interval", "9999"]
    process = subprocess.Popen([sys.executable, "03_wgan_gp.py", *flags, "--output-dir", tmp_path], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "epoch " not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    line, = process.stderr.read().splitlines()
    process.stderr.close()
    assert process.wait() == 130 and line.startswith("interrupted after") and f"--resume {tmp_path / NAME}" in line
    assert torch.load(tmp_path / NAME / "checkpoint.pt", weights_only=True)["step"] >= 1
