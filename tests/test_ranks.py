"""torchrun: two processes with half of the batch each train as one with the whole."""

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from conftest import ROOT, load_script, run_script, unchanged  # puts common on the path, for the processes, too

import common

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*arguments, **settings):
    return subprocess.run([*TORCHRUN, *map(str, arguments)], check=False, capture_output=True, text=True, cwd=ROOT,
                          timeout=300, **settings)


def one_step(script, share):
    """Networks of a script after one step of each on the samples in `share`: gradients by name.

    Without Dropout and batch statistics: a step is then the mean over samples whose random numbers are given.
    """
    torch.manual_seed(0)
    module, wgan = load_script(script), script == "03_wgan_gp"
    if wgan:
        generator, critic = module.PointsGenerator(8), module.PointsCritic()
    else:
        generator, critic = module.Generator(8, 32, 1, 32), module.Discriminator(32, 1, 32)
        critic.last[0].parametrizations.weight.original.data[:, -1] = 0  # the batch's deviation is not looked at
        generator.mapping[-1].eval()  # nor are the batch's means of w
        for block in generator.blocks:  # nor is the noise
            block.noise1.data.zero_(), block.noise2.data.zero_()
    real, z = torch.randn(8, *((2,) if wgan else (1, 32, 32)))[share], torch.randn(8, 8)[share]
    epsilon = torch.rand(8, 1)[share]
    optimizers = [torch.optim.SGD(network.parameters(), 0.0) for network in (generator, critic)]
    if common.RANKS > 1:
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(common.average_gradients)
    if wgan:
        module.torch = Fixed(epsilon)
        module.critic_step(generator, critic, optimizers[1], real, z, 10.0)
        module.generator_step(generator, critic, optimizers[0], z)
    else:
        module.discriminator_step(generator, critic, optimizers[1], real, z, 0.0, 1.0)
        module.generator_step(generator, critic, optimizers[0], z, 0.0)
    return {f"{kind} {name}": parameter.grad for kind, network in (("G", generator), ("C", critic))
            for name, parameter in network.named_parameters()
            if parameter.grad is not None and not name.startswith("last.0.parametrizations") and ".noise" not in name}


class Fixed:
    """torch, but for rand(), which returns these numbers."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __getattr__(self, name):
        return (lambda *size, **options: self.numbers.view(*size[0])) if name == "rand" else getattr(torch, name)


def train(script, folder, *flags):
    """A training; at its end each process keeps what it had in `folder`. With STOP=N rank 0 gets a SIGTERM in step N."""
    leave, steps, record, recorded, noise = common.Run.__exit__, common.Run.steps, common.Run.record, [], []
    module = load_script(script)
    draw = module.generate_noise

    def recording(run, quantities):
        recorded.extend((run.epoch, name, value.item()) for name, value in quantities.items())
        record(run, quantities)

    def drawing(count, args, device, rng=None):
        z = draw(count, args, device, rng)
        noise.extend([z] if rng is None else [])
        return z

    def stopping(run):
        for _ in steps(run):
            yield
            if str(run.step + 1) == os.environ.get("STOP") and common.RANK == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    def keep(run, *error):
        weights = {name: value.detach() for name, value in run.state["generator"].named_parameters()}
        torch.save({"weights": weights, "recorded": recorded, "noise": noise}, f"{folder}/{common.RANK}.pt")
        return leave(run, *error)

    common.Run.__exit__, common.Run.steps, common.Run.record, module.generate_noise = keep, stopping, recording, drawing
    common.guarded(lambda: module.main(list(flags)))


if __name__ == "__main__":  # one of the processes of the tests below
    task, *arguments = sys.argv[1:]
    if task == "train":
        train(*arguments)
    else:
        torch.distributed.init_process_group("gloo")
        for script in arguments:
            torch.save(one_step(script, slice(common.RANK, None, common.RANKS)), f"{task}/{script}-{common.RANK}.pt")


STEPS = ["03_wgan_gp", "06_stylegan_blocks"]


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A folder with what one step of each script gave in two processes."""
    folder = tmp_path_factory.mktemp("steps")
    process = torchrun(__file__, folder, *STEPS)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.mark.parametrize("script", STEPS)
def test_two_halves_give_the_gradients_of_the_whole(script, halves, monkeypatch):
    monkeypatch.setattr(load_script(script), "torch", torch)  # put back what one_step replaces
    whole = one_step(script, slice(None))
    first, second = (torch.load(halves / f"{script}-{rank}.pt") for rank in (0, 1))
    assert sum(gradient.abs().max() > 1e-4 for gradient in whole.values()) > len(whole) / 2
    for name, gradient in whole.items():
        assert torch.equal(first[name], second[name]), "both make the same step"
        torch.testing.assert_close(first[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_sample_belongs_to_one_process(ranks, tmp_path, monkeypatch):
    """All have as many, so that fewer samples than there are processes may be left out."""
    data, shares = common.Data("ring", torch.zeros(100, 2), torch.arange(100)), []
    monkeypatch.setattr(common, "RANKS", ranks)
    monkeypatch.setattr(common, "join_ranks", lambda args: None)
    monkeypatch.setattr(common, "largest_of_ranks", lambda wish: wish)
    monkeypatch.setattr(common, "load_data", lambda *_: data)
    monkeypatch.setattr(common.distributed, "barrier", lambda: None)
    for rank in range(ranks):
        monkeypatch.setattr(common, "RANK", rank)
        args = Namespace(script="", variant="", dataset="ring", data_dir="", output_dir=tmp_path, channels=1, seed=0,
                         device="cpu", resume=None, eval_interval=0, batch_size=6, classes=0)
        shares.append(common.prepare(args).labels.tolist())
    assert {len(share) for share in shares} == {100 // ranks}
    assert len({label for share in shares for label in share}) == 100 // ranks * ranks


@pytest.mark.parametrize("script, flags", [
    ("03_wgan_gp", []), pytest.param("06_stylegan_blocks", ["--width", "32", "--latent-dim", "8"], marks=pytest.mark.slow)])
def test_one_run_of_two_processes(script, flags, tmp_path):
    process = torchrun(__file__, "train", script, tmp_path, "--dataset", "digits", "--epochs", 2, "--max-batches", 2, "--batch-size", 16,
                       "--device", "cpu", "--eval-interval", 0, "--output-dir", tmp_path / "runs", *flags)
    assert process.returncode == 0, process.stderr
    folder, = (tmp_path / "runs").iterdir()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert unchanged(first["weights"], second["weights"]), "both have the same weights"
    assert first["noise"] and not any(torch.equal(a, b) for a in first["noise"] for b in second["noise"]), "each draws its own"
    lines = process.stdout.splitlines()
    assert len([line for line in lines if line.startswith("epoch")]) == 2 and lines[1].endswith(", 2 processes")
    assert sum("60000 samples" in line and line.endswith("batch 16") for line in lines) == 1
    options = json.loads((folder / "options.json").read_text())
    assert (options["batch_size"], options["ranks"]) == (16, 2)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [2, 4]
    for row in log:  # the mean over both processes
        for name in {name for _, name, _ in first["recorded"]}:
            values = [value for epoch, key, value in first["recorded"] + second["recorded"] if (epoch + 1, key) == (row["epoch"], name)]
            assert row[name] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-6), name
    assert (folder / "samples" / "final.png").exists()
    drawn = run_script(script, "--from", folder)
    assert drawn.returncode == 0, drawn.stderr


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(tmp_path):
    """A signal to one of them ends both after the same step; resumed, they end with the log of an undisturbed training."""
    flags = ["--dataset", "digits", "--epochs", 3, "--max-batches", 5, "--batch-size", 16, "--eval-interval", 0, "--output-dir"]
    for name, environment, arguments, code in [
            ("plain", {}, [*flags, tmp_path / "plain"], 0), ("torn", {"STOP": "8"}, [*flags, tmp_path / "torn"], 1),
            ("torn", {}, ["--resume", "--output-dir", tmp_path / "torn"], 0)]:
        process = torchrun(__file__, "train", "03_wgan_gp", tmp_path, *arguments, env={**os.environ, **environment})
        assert process.returncode == code and ("interrupted after 1 epochs" in process.stdout) == (code == 1), process.stderr
    logs = [(tmp_path / name / "03_wgan_gp-digits-0001" / "log.jsonl").read_text() for name in ("plain", "torn")]
    plain, torn = ([{**json.loads(line), "seconds": 0} for line in log.splitlines()] for log in logs)
    assert plain == torn and len(torn) == 3


@pytest.mark.parametrize("flags, wrong", [(["--batch-size", 15], "--batch-size 15"), (["--from", "run"], "torchrun is for trainings")])
def test_refused(flags, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RANKS", 2)
    with pytest.raises(SystemExit) as stop:
        load_script("03_wgan_gp").main(["--dataset", "digits", "--output-dir", str(tmp_path), *map(str, flags)])
    assert stop.value.code == 2 and not list(tmp_path.iterdir()) and f": error: {wrong}" in capsys.readouterr().err
