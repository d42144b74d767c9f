"""Scores: each formula against an oracle that nobody here wrote, planted sets, and the way from a run to its table."""

import itertools
import json
import math
import re
from argparse import Namespace

import numpy as np
import prdc
import pytest
import scipy
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore

from conftest import ROOT, load_script, snapshot, unchanged  # puts common on the path

import common

# --------------------------------------------------------------------------------------- formulas

def features(count, dimensions, seed):
    """Correlated features away from the origin."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimensions, dimensions, generator=rng)
    return torch.randn(count, dimensions, generator=rng) @ mix + torch.randn(dimensions, generator=rng)


@pytest.mark.parametrize("count", [500, 100, 5], ids=["more than features", "more", "fewer than features"])
def test_frechet_distance_against_scipy(count):
    for a, b in [(features(count, 8, 1), features(400, 8, 2)), (features(count, 8, 1), features(count, 8, 1) * 1.5),
                 (torch.ones(count, 8), features(400, 8, 2)), (torch.ones(count, 8), torch.zeros(9, 8))]:
        a, b = a.double(), b.double()
        s1, s2 = np.cov(a.numpy().T), np.cov(b.numpy().T)
        with np.errstate(all="ignore"):
            root = scipy.linalg.sqrtm(s1 @ s2 + 1e-12 * np.eye(8))  # scipy's root of a singular matrix is not defined
        expected = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(s1 + s2 - 2 * root).real
        assert common.frechet_distance(a, b) == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_frechet_distance_of_gaussians():
    """N(m, diag(s^2)) and N(0, I): |m|^2 + sum (s - 1)^2; samples with exactly these moments."""
    raw = features(1000, 4, 3).double()
    white = (raw - raw.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(raw.T.cov())).T
    m, s = torch.tensor([1.0, -2.0, 0.0, 0.5]).double(), torch.tensor([1.0, 2.0, 0.5, 0.0]).double()
    assert common.frechet_distance(white * s + m, white) == pytest.approx((m.square() + (s - 1).square()).sum().item())
    assert common.frechet_distance(white, white) == pytest.approx(0, abs=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save", "ignore:std")
def test_inception_score_against_torchmetrics():
    logits = features(500, 10, 4)
    metric = InceptionScore(nn.Flatten(), splits=1)  # nn.Flatten: the network that reads images gives these logits
    metric.update(logits.view(-1, 1, 1, 10))
    assert common.inception_score(logits.softmax(1)) == pytest.approx(metric.compute()[0].item(), rel=1e-5)


def test_inception_score_closed_forms():
    assert common.inception_score(torch.eye(10).repeat(7, 1)) == pytest.approx(10)
    assert common.inception_score(torch.eye(10)[[1, 7] * 50]) == pytest.approx(2), "two classes of ten"
    for alike in (torch.eye(10)[[3] * 50], torch.full((50, 10), 0.1)):
        assert common.inception_score(alike) == pytest.approx(1)


@pytest.mark.parametrize("count, spread", [(700, 1.0), (1200, 0.3), (40, 3.0)])
def test_precision_and_recall_against_prdc(count, spread):
    """More samples than a block of 500 holds, in both sets."""
    base = features(1200, 8, 5)
    real, fake = base[:1100], base[:count] * spread + 0.1 * features(count, 8, 6)
    expected = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=common.NEIGHBOURS)
    assert common.precision_recall(fake, real) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-12)


def test_precision_and_recall_closed_forms():
    line = torch.arange(20.0)[:, None]
    assert common.precision_recall(line, line) == (1, 1)
    assert common.precision_recall(line + 100, line) == (0, 0)
    few = torch.tensor([[10.0]]).expand(20, 1)  # one sample, twenty times: precise, and covers nothing but itself
    assert common.precision_recall(few, line) == (1, 1 / 20)


def test_divergence_against_scipy():
    counts, shares = torch.tensor([5, 0, 3, 2]), torch.tensor([0.4, 0.1, 0.3, 0.2])
    assert common.divergence(counts, shares) == pytest.approx(scipy.stats.entropy(counts, shares), rel=1e-6)
    assert common.divergence(torch.zeros(4), shares) is None
    assert common.divergence(counts, torch.tensor([0.5, 0.5, 0.0, 0.0])) is None
    assert common.divergence(torch.tensor([5, 5, 0]), torch.tensor([0.5, 0.5, 0.0])) == pytest.approx(0)


# ----------------------------------------------------------------------------------------- points

@pytest.mark.parametrize("name, modes", [("gaussians", 8), ("ring", 8), ("grid", 25)])
def test_perfect_samplers(name, modes):
    """Fresh points of the mixture score what the floor says, on average."""
    centres, sigma = common.MIXTURES[name]
    assert centres.shape == (modes, 2) and nn.functional.pdist(centres).min() > 6 * sigma, "discs that do not touch"
    floor = common.make_scorer(Namespace(dataset=name)).floor
    samples = common.load_data(options(dataset=name)).samples
    scores = [common.mixture_scores(part, centres, sigma) for part in samples[:50_000].split(2500)]
    assert all(score["modes"] == floor["modes"] == modes for score in scores)
    assert floor["high_quality"] == pytest.approx(1 - math.exp(-4.5)), "chi-squared of two dimensions at 3 sigma"
    assert np.mean([score["high_quality"] for score in scores]) == pytest.approx(floor["high_quality"], abs=0.002)
    assert np.mean([score["KL"] for score in scores]) == pytest.approx(floor["KL"], rel=0.3), "the bias of an estimate"


@pytest.mark.parametrize("name", common.MIXTURES)
def test_planted_collapse_of_points(name):
    centres, sigma = common.MIXTURES[name]
    kept = centres[:len(centres) // 2].repeat(50, 1)
    scores = common.mixture_scores(kept, centres, sigma)
    assert scores["modes"] == len(centres) // 2 and scores["high_quality"] == 1
    assert scores["KL"] == pytest.approx(math.log(len(centres) / (len(centres) // 2)), rel=1e-6)
    one = torch.cat([kept, centres[-1:]])  # a single point captures a mode
    assert common.mixture_scores(one, centres, sigma)["modes"] == len(centres) // 2 + 1
    edge = centres[:1] + torch.tensor([[2.99 * sigma, 0], [3.01 * sigma, 0], [2.2 * sigma, 2.2 * sigma]])
    scores = common.mixture_scores(edge, centres, sigma)  # a disc, no square
    assert scores["counts"][0] == 1 and scores["high_quality"] == pytest.approx(1 / 3)
    nowhere = common.mixture_scores(torch.full((10, 2), 99.0), centres, sigma)
    assert (nowhere["modes"], nowhere["high_quality"], nowhere["KL"]) == (0, 0, None)


# ------------------------------------------------------------------------------------- classifier

@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def digits(monkeypatch, cache):
    """8,000 training and 500 test digits, and a cache of classifiers of our own."""
    images, labels = common.draw_digits("test")
    parts = {"train": slice(8000), "test": slice(8000, 8500)}
    monkeypatch.setattr(common, "draw_digits", lambda split: (images[parts[split]], labels[parts[split]]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def options(**changes):
    digits = dict(dataset="digits", data_dir="", channels=1, image_size=28, classes=0, batch_size=1)
    return Namespace(**{**digits, **changes})


@pytest.fixture
def scorer(digits):
    return common.make_scorer(options(classes=10))


@pytest.mark.slow
def test_classifier_reads_99_percent(monkeypatch, tmp_path):
    """Of all drawn digits; real images score nearly as high as can be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scorer = common.make_scorer(options())
    assert float(re.search(r"right on ([\d.]+)%", scorer.against)[1]) >= 99
    assert scorer.floor["IS"] > 9.5 and scorer.floor["classes"] == 10 and scorer.floor["KL"] < 0.01
    assert min(scorer.floor["precision"], scorer.floor["recall"]) > 0.8


def test_cache_of_classifiers(monkeypatch, tmp_path, capsys):
    """One for each data set, trained once; a damaged file, or none that can be kept, is no hindrance."""
    def load(images, labels, says="training a classifier of digits"):
        network, out = common.load_classifier("digits", images, labels), capsys.readouterr().out
        assert not network.training and (says in out if says else out == "")
        return network.state_dict()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images, labels = torch.randint(256, (512, 1, 28, 28), dtype=torch.uint8), torch.arange(512) % 10
    random = torch.get_rng_state()
    first = load(images, labels)
    assert torch.equal(random, torch.get_rng_state()), "a training keeps its random numbers"
    assert unchanged(first, load(images, labels, says=""))
    path, = (tmp_path / "cache").rglob("*.*")
    path.write_bytes(path.read_bytes()[:5000])
    assert unchanged(first, load(images, labels)), "the same weights again"
    load(images.roll(1, 0), labels), load(images, labels.roll(1))
    assert len(list((tmp_path / "cache").rglob("*.*"))) == 3
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert unchanged(first, load(images, labels, says="not kept"))


def test_the_floor_is_of_images_that_the_classifier_has_not_seen(digits, monkeypatch):
    """Every sixth training image."""
    seen, network = [], common.make_classifier().eval()
    monkeypatch.setattr(common, "load_classifier", lambda name, *data: seen.extend(data) or network)
    scorer, (images, labels) = common.make_scorer(options()), common.draw_digits("train")
    others = torch.arange(8000) % 6 != 5
    assert torch.equal(seen[0], images[others]) and torch.equal(seen[1], labels[others])
    expected = score(scorer, images[5::6])
    assert scorer.floor.pop("counts") == expected.pop("counts") and scorer.floor == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size, channels", [(28, 3), (32, 1), (64, 1), (128, 3)])
def test_larger_images_are_read_as_they_were(scorer, size, channels):
    """At the size of 02's ladder and of 06: the classifier sees the 28x28 pixels again, or nearly."""
    large = common.load_data(options(image_size=size, channels=channels), "test")
    index = torch.arange(250)
    features, probabilities = scorer.read([large.scaled(index)])
    if size <= 32:
        torch.testing.assert_close(features, scorer.reference[index])
    assert (probabilities.argmax(1) == scorer.test.labels[index]).double().mean() > 0.9


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_are_read_as_a_file_would_hold_them(scorer, channels):
    """Rounded to 256 levels, cut off at black and white, in grey: nothing finer or beyond reaches the classifier."""
    images = torch.arange(256, dtype=torch.uint8).repeat(49).view(16, 1, 28, 28)
    images = torch.cat([images.roll(channel, 0) for channel in range(channels)], 1)
    samples = (images + torch.linspace(-0.45, 0.45, images.numel()).view(images.shape)) / 127.5 - 1
    features, probabilities = scorer.read([torch.where(images == 255, 2, torch.where(images == 0, -2, samples))])
    grey = (images / 255).mean(1, keepdim=True)
    torch.testing.assert_close(features, scorer.classifier[:-1](grey))
    torch.testing.assert_close(probabilities, scorer.classifier(grey).softmax(1))


# ---------------------------------------------------------------------------------- planted sets

def score(scorer, images, labels=None):
    return scorer.compare(*scorer.read((images.float() / 127.5 - 1).split(250)), labels)


def test_planted_sets(scorer):
    """Ones and sevens; one image per class; noise; one grey image: what each score sees, and what it does not."""
    images, labels = (part[5::6][:1000] for part in common.draw_digits("train"))
    scorer.args.classes = 0
    real = score(scorer, images)
    ones_and_sevens = images[(labels == 1) | (labels == 7)].repeat(6, 1, 1, 1)[:995]
    two = score(scorer, torch.cat([ones_and_sevens, images[labels == 3][:5]]))
    assert two["classes"] == 2 and two["counts"][3] >= 4, "five threes are less than a tenth of their share"
    assert 1.8 < two["IS"] < 2.4, "exercise 2"
    assert two["KL"] == pytest.approx(math.log(5), abs=0.15) and two["FD"] > 10 * scorer.floor["FD"]
    assert two["precision"] > 0.8 and two["recall"] < 0.4
    clearest = scorer.read([images / 127.5 - 1])[1].argmax(0)
    ten = score(scorer, images[clearest].repeat(100, 1, 1, 1))
    assert ten["IS"] > 0.95 * real["IS"] and ten["classes"] == 10, "the Inception Score does not see it"
    assert ten["FD"] > 5 * real["FD"] and ten["recall"] < 0.1
    noise = score(scorer, torch.randint(256, (1000, 1, 28, 28), generator=torch.Generator().manual_seed(0)))
    grey = score(scorer, torch.full((1000, 1, 28, 28), 128))
    for scores in (noise, grey):
        assert 20 * real["FD"] < scores["FD"] < math.inf and scores["recall"] < 0.1
    assert grey["IS"] == pytest.approx(1) and grey["classes"] == 1


class Copies(nn.Module):
    """A perfect conditional generator, images of the class chosen by z; but for noise on their pixels."""

    def __init__(self, images, labels):
        super().__init__()
        self.classes = [images[labels == digit] for digit in range(10)]
        self.noise = nn.Parameter(torch.zeros(()))

    def forward(self, z, labels):
        classes = [self.classes[label] for label in labels]
        images = torch.stack([members[i % len(members)] for i, members in zip(z[:, 0].mul(1e4).int(), classes)])
        return images / 127.5 - 1 + self.noise * torch.randn(images.shape)


def test_damage_shows_in_every_score(scorer):
    """A perfect generator scores as real images do; noise makes every score worse, step by step."""
    generator, series = Copies(*common.draw_digits("train")), []
    args = options(latent_dim=1, classes=10, seed=0, label=None)
    pipeline = common.Pipeline(generator, load_script("02_dcgan").generate_noise, args)
    torch.manual_seed(0)
    for noise in (0, 0.5, 0.75):
        generator.noise.data.fill_(noise)
        series.append(scorer(pipeline))
    assert series[0]["FD"] < 2 * scorer.floor["FD"] and series[0]["as_asked"] > 0.95 and series[0]["classes"] == 10
    for better, worse in itertools.pairwise(series):
        assert all(worse[name] < better[name] for name in ("IS", "precision", "recall", "as_asked")), worse
        assert all(worse[name] > better[name] for name in ("FD", "KL")), worse


# ------------------------------------------------------------------------------------------- runs

@pytest.fixture
def train(tmp_path, digits, monkeypatch):
    """Run a script on few digits in this process; returns its folder. Its curves are kept as train.plots, not drawn."""
    def call(script, *arguments):
        kernels = ["--kernels", "reference"] if script[:2] in ("03", "04") else []  # the cache is empty: no compiling
        load_script(script).main(["--dataset", "digits", "--max-batches", "2", "--batch-size", "16", "--device", "cpu",
                                  *kernels, *map(str, arguments), "--output-dir", str(tmp_path)])
        return max(tmp_path.glob(f"{script}*"))

    monkeypatch.setattr(common, "save_curves", lambda history, plots, path: setattr(call, "plots", plots))
    monkeypatch.setattr(common.Run, "_final_pictures", lambda run: None)  # for speed
    return call


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_scores_of_a_run(train, capsys):
    """Every other epoch and at the end: log, curves, table, metrics.json; --evaluate repeats them to the digit."""
    folder = train("04_cgan", "--epochs", 3, "--eval-interval", 2)
    output = capsys.readouterr().out
    log, metrics = read_log(folder), json.loads((folder / "metrics.json").read_text())
    assert [row["epoch"] for row in log if "FD" in row] == [2, 3] and output.count("samples against") == 2
    floor, names = metrics["real images"], {"IS", "FD", "precision", "recall", "classes", "KL", "as_asked", "counts"}
    assert set(floor) == names and {name: log[-1][name] for name in names} == {name: metrics[name] for name in names}
    assert (metrics["epoch"], metrics["samples"], metrics["seed"], sum(metrics["counts"])) == (3, 500, 0, 500)
    for name in names - {"counts"}:
        title, form, _ = common.SCORES[name]
        cells = [format(value, form) for value in (metrics[name], floor[name])]
        assert re.search(rf"^{title} +{cells[0]} +{cells[1]}  ", output, re.MULTILINE)
    title, names, guides = next(plot for plot in train.plots if plot[1] == ["FD"])
    assert guides == {f"real images {floor['FD']:.3f}": floor["FD"]}

    before = (folder / "metrics.json").read_bytes()
    load_script("04_cgan").main(["--device", "cpu", "--from", str(folder), "--evaluate"])
    assert (folder / "metrics.json").read_bytes() == before and not list((folder / "samples").glob("generated*"))


def test_points_are_scored(train):
    folder = train("05_sn_label_smoothing", "--dataset", "ring", "--epochs", 2)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["against"] == "the 8 Gaussians of ring" and metrics["samples"] == 2500
    assert metrics["perfect sampler"]["modes"] == 8 and sum(metrics["counts"]) <= 2500
    assert ["modes" in row for row in read_log(folder)] == [False, True], "at the end alone"
    assert not [names for _, names, _ in train.plots if names == ["modes"]], "one point is no trajectory"


def test_scoring_leaves_the_training_alone(train):
    """No scores, or scores after each epoch, train the same; so does a moving average, which is what is scored."""
    names = ["W", "penalty", "grad_norm", "loss_C", "loss_G"]
    for dataset in ("digits", "ring"):
        logs = [read_log(train("03_wgan_gp", "--epochs", 2, "--dataset", dataset, *flags))
                for flags in (["--eval-interval", 0], ["--eval-interval", 1, "--ema-decay", 0.9])]
        plain, scored = ([[row[name] for name in names] for row in log] for log in logs)
        assert plain == scored


def test_moving_average(train, monkeypatch):
    """After each step the mean of all so far, with weights 1, 0.9, 0.81, ... back from it; that is scored and drawn."""
    followed, seen, update = [], [], common.update_average

    def follow(average, generator, decay, step):
        update(average, generator, decay, step)
        seen.append(snapshot(generator.state_dict().items()))
        assert step == len(seen)
        weights = [0.9**age for age in reversed(range(step))]
        for name, value in average.state_dict().items():
            mean = sum(weight * state[name] for weight, state in zip(weights, seen, strict=True)) / sum(weights)
            torch.testing.assert_close(value, mean if value.is_floating_point() else seen[-1][name])
        followed.append(snapshot(average.state_dict().items()))

    monkeypatch.setattr(common, "update_average", follow)
    folder = train("03_wgan_gp", "--epochs", 2, "--ema-decay", 0.9, "--lr-g", 0.01)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(followed) == 4 and unchanged(followed[-1], checkpoint["average"])
    assert unchanged(seen[-1], checkpoint["generator"]), "taken after the step, not before"
    assert not unchanged(checkpoint["average"], checkpoint["generator"])
    plain = train("03_wgan_gp", "--epochs", 2, "--lr-g", 0.01)
    for name in ("metrics.json", "samples/epoch_0002.png"):
        assert (folder / name).read_bytes() != (plain / name).read_bytes()
    assert "average" not in torch.load(plain / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("decay, expected", [(1, [1, 3 / 4, 2 / 4, 1 / 4]), (0.5, [1, 1, 1, 0.5]), (0, [1, 1, 1, 1])])
def test_learning_rates_fall_to_0(train, monkeypatch, decay, expected):
    """Linearly over the last part of the training, every optimizer from its own rate."""
    rates, step = {0.01: [], 0.02: []}, torch.optim.Adam.step

    def watch(optimizer):
        group, = optimizer.param_groups
        rates[group["initial_lr"]].append(group["lr"])
        return step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", watch)
    train("01_vanilla_gan", "--epochs", 2, "--lr-decay", decay, "--lr-g", 0.01, "--lr-d", 0.02, "--eval-interval", 0)
    assert rates == {first: pytest.approx([first * part for part in expected]) for first in rates}


def test_the_code_of_exercise_2_runs(digits, monkeypatch, tmp_path, capsys):
    """As printed in docs/exercises.md, but on drawn digits."""
    text = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    code, = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.count('"mnist"') == 1
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"mnist"', '"digits"').replace("repeat(1000", "repeat(100"), {})  # noqa: S102
    lines = capsys.readouterr().out.splitlines()
    real, two = (eval(line[line.index("{"):]) for line in lines if line.startswith(("real", "ones")))
    assert (real["classes"], two["classes"]) == (10, 2) and two["IS"] < 2.5 and real["IS"] > 8.5
    clusters = [json.loads(line.partition(":")[2]) for line in lines if line.startswith("k-means")]
    assert len(clusters) == 2 and all(len(sizes) == 10 and sizes[0] > 0 for sizes in clusters), "k-means does not tell"
    assert (tmp_path / "ones and sevens.png").exists()
