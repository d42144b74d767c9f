"""--compare-kernels: what it times, what it refuses to time, and what it writes."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import common
from conftest import load_script
from csrc import compare, ops


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """One small shape, three rounds, and a compiler that is there at once."""
    ops.choose("fused", request.param)
    monkeypatch.setattr(compare, "SHAPES", {"penalty": [(5, 6)], "adain": [(2, 3, 4, 4)]})
    monkeypatch.setattr(compare, "beyond_the_cache", lambda shape, device, free: None)
    monkeypatch.setattr(compare, "ROUNDS", 3)
    monkeypatch.setattr(compare, "keep_freed_memory", lambda: None)  # the tests to come want theirs back
    monkeypatch.setattr(compare.torch, "compile", lambda function, dynamic: function)
    return request.param


def compared(script, formula, step, device, folder):
    args = Namespace(script=script, variant="v", dataset="digits", batch_size=7, device=device, output_dir=folder)
    common.compare_kernels(args, formula, step)


@pytest.mark.parametrize("kind, script, name, passes", [
    ("penalty", "03_wgan_gp", "penalty_of", [1, 3]), ("adain", "06_stylegan_blocks", "adain", [2, 5])])
def test_table_and_file(kind, script, name, passes, device, tmp_path, capsys):
    steps = []
    compared(script, getattr(load_script(script), name), lambda: steps.append(bool(ops.KERNELS)), device, tmp_path)
    assert set(steps) == {True, False} and abs(sum(steps) - len(steps) / 2) < len(steps) / 4, "with kernels and without, in turn"
    table = json.loads((tmp_path / f"{script}-kernels.json").read_text())
    assert (table["kernel"], table["script"], table["dataset"], table["batch_size"]) == (kind, script, "digits", 7)
    assert table["threads"] == torch.get_num_threads() and table["torch"] == torch.__version__
    size = 4 * torch.Size(compare.SHAPES[kind][0]).numel()
    assert [(row["pass"], row["bytes"]) for row in table["rows"]] == list(zip(["forward", "both passes"], [size * n for n in passes]))
    for row in table["rows"]:
        assert row["seconds"].keys() == row["errors"].keys() == {"reference", "fused", "torch.compile"}
        assert all(0 <= error < 1e-5 for error in row["errors"].values())
        assert row["bandwidth"] == pytest.approx(row["bytes"] / row["seconds"]["fused"]["median"])
        assert all(0 < time["best"] <= time["median"] and time["spread"] >= 0 for time in row["seconds"].values())
    shown = capsys.readouterr().out
    assert "x".join(map(str, compare.SHAPES[kind][0])) in shown and "times as fast" in shown and "too little memory" in shown


@pytest.mark.parametrize("wrong", [lambda y: y * 1.001, lambda y: y * torch.nan, lambda y: y.clamp(max=0)])
def test_what_is_wrong_is_not_timed(wrong, device, tmp_path, capsys):
    """And the comparison ends with exit code 1, after its file, which is JSON without NaN."""
    formula = load_script("06_stylegan_blocks").adain.formula

    def fused(*tensors, **options):
        return wrong(formula(*tensors, **options))

    fused.formula, fused.kernel = formula, "adain"
    with pytest.raises(SystemExit) as stopped:
        compared("06", fused, lambda: None, device, tmp_path)
    shown = capsys.readouterr()
    assert stopped.value.code == 1 and shown.err.endswith("error: a fused kernel is wrong\n") and shown.out.count("not timed") == 2
    for row in json.loads((tmp_path / "06-kernels.json").read_text(), parse_constant=pytest.fail)["rows"]:
        assert row["seconds"].keys() == {"reference", "torch.compile"} and "bandwidth" not in row
        assert row["errors"]["fused"] == "nan" or row["errors"]["fused"] > 1e-5


def test_a_file_that_cannot_be_written(device, tmp_path, capsys):
    (tmp_path / "03-kernels.json").mkdir()
    with pytest.raises(SystemExit) as stopped:
        compared("03", load_script("03_wgan_gp").penalty_of, lambda: None, device, tmp_path)
    assert stopped.value.code == 1 and "03-kernels.json cannot be written (Is a directory)\n" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["03-kernels.json"]


def test_nothing_is_right(device, monkeypatch):
    monkeypatch.setattr(compare, "TOLERANCE", -1.0)
    rows = compare.compare_shape(load_script("06_stylegan_blocks").adain, (2, 3, 4, 4), device)
    assert [row["seconds"] for row in rows] == [{}, {}] and all(compare.line(row).count("not timed") == 3 for row in rows)


def test_a_wrong_gradient_alone_is_not_timed(device):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * torch.nan

    formula = load_script("06_stylegan_blocks").adain.formula

    def fused(x, *tensors, **options):
        return formula(Wrong.apply(x), *tensors, **options)

    fused.formula, fused.kernel = formula, "adain"
    assert all("fused" not in row["seconds"] for row in compare.compare_shape(fused, (2, 3, 4, 4), device))


@pytest.mark.parametrize("script, operator, shapes", [
    ("03_wgan_gp", "Penalty", [(300, 784)]),
    ("06_stylegan_blocks", "AdaIN", [(32, c, s, s) for c, s in [(64, 4), (64, 8), (32, 16), (16, 32)] for _ in range(2)])])
def test_the_step_is_the_whole_one(script, operator, shapes, monkeypatch, tmp_path):
    """At 06's full size too, where a training that grows does not begin."""
    seen, forward = [], getattr(ops, operator).forward
    monkeypatch.setattr(getattr(ops, operator), "forward",
                        lambda ctx, x, *others: seen.append(tuple(x.shape)) or forward(ctx, x, *others))
    monkeypatch.setattr(common, "compare_kernels", lambda args, formula, step: step())
    load_script(script).main(["--compare-kernels", "--dataset", "digits", "--output-dir", str(tmp_path)])
    assert sorted(seen) == sorted(shapes)


@pytest.mark.parametrize("free, samples", [(1e15, 2**22), (1e10, None)])
def test_a_shape_beyond_the_last_cache(free, samples, monkeypatch):
    """So many samples that a tensor is four times as large as the cache, if the memory holds what the reference needs."""
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [folder / "size"])
    monkeypatch.setattr(Path, "read_text", lambda path: "4194304K\n")  # 4 GiB
    shape = compare.beyond_the_cache((16, 3, 20, 20), "cpu", free)
    assert shape == (samples and (samples, 3, 20, 20))
    assert not samples or 4 * 2**32 <= 4 * samples * 1200 < 8 * 2**32


@pytest.mark.parametrize("flags, complaint", [
    (["--kernels", "reference"], "compares fused kernels with the reference; leave out --kernels"),
    (["--from", "nowhere"], "nowhere does not exist")])
def test_contradictions(flags, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        load_script("03_wgan_gp").main(["--compare-kernels", *flags])
    assert stop.value.code == 2 and complaint in capsys.readouterr().err
