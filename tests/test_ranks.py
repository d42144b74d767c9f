"""torchrun: two processes train one run, and resume it.

Started by torchrun, this file is one of those processes: it trains 03 with the flags after the first, which names a
folder that receives what each process has at its end.
"""

import json
import subprocess
import sys

import torch

from conftest import ROOT, load_script, unchanged  # puts common on the path, for the processes, too

import common

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train(folder, *flags):
    module, noise = load_script("03_wgan_gp"), []
    draw = module.generate_noise

    def keep_noise(count, args, device, rng=None):
        z = draw(count, args, device, rng)
        noise.extend([z] if rng is None else [])  # those of the pictures have an rng
        return z

    module.generate_noise = keep_noise
    common.guarded(lambda: module.main(list(flags)))

    layer = torch.nn.Linear(2, 1)  # one gradient with known values: 1 in the first process, 2 in the second
    layer.weight.grad, layer.bias.grad = (torch.full_like(part, common.RANK + 1.0) for part in layer.parameters())
    common.average_gradients(torch.optim.SGD(layer.parameters(), 0.1))
    run = common.Run.current
    torch.save({"weights": run.state["generator"].state_dict(), "noise": noise, "step": run.step,
                "mean": [part.grad.unique().tolist() for part in layer.parameters()]}, f"{folder}/{common.RANK}.pt")


if __name__ == "__main__":
    train(*sys.argv[1:])


def torchrun(folder, *flags):
    """What is printed, and what each of two processes has at its end."""
    process = subprocess.run([*TORCHRUN, __file__, str(folder), *map(str, flags)], cwd=ROOT, capture_output=True,
                             text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout, *(torch.load(folder / f"{rank}.pt") for rank in (0, 1))


def test_two_processes_train_one_run_and_resume_it(tmp_path):
    printed, first, second = torchrun(
        tmp_path, "--dataset", "gaussians", "--epochs", 1, "--max-batches", 2, "--batch-size", 16, "--device", "cpu",
        "--eval-interval", 0, "--output-dir", tmp_path / "runs")
    folder, = (tmp_path / "runs").iterdir()  # the second process leaves none
    assert printed.count("\nepoch ") == 1, "only one speaks"
    assert unchanged(first["weights"], second["weights"]) and first["mean"] == second["mean"] == [[1.5], [1.5]]
    assert first["noise"][0].shape == (16, 100), "each has batches of --batch-size"
    assert not any(torch.equal(a, b) for a in first["noise"] for b in second["noise"]), "each draws its own"

    printed, later, second = torchrun(tmp_path, "--resume", folder, "--epochs", 2)
    assert printed.count("\nepoch ") == 1 and unchanged(later["weights"], second["weights"])
    assert not unchanged(first["weights"], later["weights"]) and (first["step"], later["step"]) == (2, 4)
    assert not any(torch.equal(a, b) for a in first["noise"] for b in later["noise"]), "no noise is seen twice"
    assert [json.loads(row)["step"] for row in (folder / "log.jsonl").read_text().splitlines()] == [2, 4]
    assert (folder / "samples" / "epoch_0002.png").exists()
