"""Runs what results.md shows, keeps a row of each run, and writes its tables.

    python docs/results.py --data-dir DIR                   all that is missing, two runs at a time
    python docs/results.py --data-dir DIR defaults cures    of these tables alone
    python docs/results.py --tables                         nothing new: tables and pictures, from what there is

A run is a command with a seed. When it ends, it becomes a row of results.jsonl, which stays until
you delete it, as after a change of a script's constants; its folder lies in runs/results/. One that
was stopped (Ctrl-C) goes on from its checkpoint when this is started again. The pictures show these
folders; one stays as it is where the folder of a run that it shows is missing.
"""

import argparse
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parent
ROOT, ROWS, DOCUMENT = DOCS.parent, DOCS / "results.jsonl", DOCS / "results.md"

# ----------------------------------------------------------------------------------- what is run
FAST = " --lr-g 5e-4 --lr-d 5e-4 --lr-decay 1 --ema-decay 0.999"
DEFAULTS = [
    "01_vanilla_gan.py", "01_vanilla_gan.py --variant keras", "01_vanilla_gan.py --variant two-logit",
    "02_dcgan.py",
    "03_wgan_gp.py", "03_wgan_gp.py" + FAST, "03_wgan_gp.py --critic conv",
    "04_cgan.py", "04_cgan.py" + FAST,
    "05_sn_label_smoothing.py",
    "06_stylegan_blocks.py",
]
PLAIN = "05_sn_label_smoothing.py --spectral-norm off"
CURES = {
    "none": PLAIN,
    "saturating loss": "01_vanilla_gan.py --generator-loss saturating",
    "labels 0.9 and 0": PLAIN + " --label-smoothing one-sided",
    "labels 0.9 and 0.1": PLAIN + " --label-smoothing two-sided",
    "labels 0.8 to 1.2 and 0": PLAIN + " --label-smoothing random",
    "two learning rates": PLAIN + " --ttur on",
    "five updates of D": PLAIN + " --n-critic 5",
    "minibatch discrimination": PLAIN + " --minibatch-discrimination on",
    "spectral normalisation": "05_sn_label_smoothing.py",
    "the two above": "05_sn_label_smoothing.py --minibatch-discrimination on",
    "WGAN-GP": "03_wgan_gp.py",
}
MIXTURES = ["gaussians", "ring", "grid"]
SETTINGS = {     # one of the text's constants changed at a time, and the checklist's: a plain GAN, WGAN-GP
    PLAIN: ["", "--lr-g 1e-3 --lr-d 1e-3", "--lr-g 5e-5 --lr-d 5e-5", "--lr-d 1e-4", "--lr-d 8e-5", "--beta1 0", "--beta1 0.9",
            "--batch-size 64", "--batch-size 1024", "--latent-dim 2", "--latent-dim 512",
            "--lr-g 2e-3 --lr-d 2e-5", "--lr-g 2e-3 --lr-d 2e-5 --n-critic 5"],
    "03_wgan_gp.py": ["", "--lr-decay 0 --ema-decay 0", "--lr-g 2e-4 --lr-d 2e-4", "--beta1 0", "--latent-dim 2",
                      "--n-critic 1", "--gp-weight 0.1", "--gp-weight 10"],
}
STEPS = " --epochs 25 --max-batches 200"     # 5,000 generator steps
SAME_TIME = " --n-critic 1 --epochs 120"     # as many updates of both networks as by default
TABLES = {
    "defaults": [(command, seed) for command in DEFAULTS for seed in range(3 if command[:2] == "06" else 1)],
    "cures": [(f"{command} --dataset {mixture}{STEPS}", seed)
              for seed in range(3) for command in CURES.values() for mixture in MIXTURES],
    "settings": [(f"{script} --dataset gaussians {flags}".rstrip() + STEPS, 0)
                 for script, all_flags in SETTINGS.items() for flags in all_flags],
    "cures-mnist": [(command, 0) for command in CURES.values() if command[:2] == "05"],
    "published": [(f"03_wgan_gp.py --dataset {mixture}", seed) for seed in range(3) for mixture in ("ring", "grid")]
                 + [("03_wgan_gp.py --dataset ring --lr-decay 0", 0), ("03_wgan_gp.py --dataset ring --gp-weight 10", 0),
                    ("03_wgan_gp.py --dataset grid" + SAME_TIME, 0)],
}

GALLERY = {     # in docs/gallery: of which run, which picture
    **{f"{command[:2]}_{name}": ((command, 0), file) for command in DEFAULTS if re.fullmatch(r"\S+", command)
       for name, file in [("training", "progress.gif"), ("interpolation", "interpolation.png"), ("walk", "latent_walk.png")]},
    **{f"06_{name}": (("06_stylegan_blocks.py", 0), f"{name}.png") for name in ("style_mixing", "truncation", "noise")},
    "collapse": ((f"{PLAIN} --dataset gaussians{STEPS}", 0), "progress.gif"),
    "cure": ((f"03_wgan_gp.py --dataset gaussians{STEPS}", 0), "progress.gif"),
}


# ---------------------------------------------------------------------------------------- running
def rows():
    """The finished runs: {(command, seed): row}."""
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    return {(row["command"], row["seed"]): row for row in map(json.loads, lines)}


def add_row(row):
    before = ROWS.read_text(encoding="utf-8") if ROWS.exists() else ""
    temporary = ROWS.with_suffix(".tmp")        # whole or not at all
    temporary.write_text(before + json.dumps(row) + "\n", encoding="utf-8")
    temporary.replace(ROWS)


def processor():
    """The model of this machine's processor, as the system names it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return found[1] if found else platform.processor()


def slug(command, seed):
    """The name of a run's folder."""
    return re.sub(r"\W+", "-", f"{command} {seed}")


def run(command, seed, data_dir, folder, threads):
    """Start one run or go on with it; its row once it is complete, else None."""
    folder = folder / slug(command, seed)
    started = sorted(folder.glob("*/checkpoint.pt"))
    script, *flags = shlex.split(command)
    flags += [] if "--dataset" in flags else ["--dataset", "mnist"]     # or nothing, but no other digits
    arguments = [*flags, "--seed", str(seed), "--output-dir", folder]
    if started:
        arguments = ["--resume", started[0].parent]
        threads = json.loads(started[0].with_name("options.json").read_text())["threads"]
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(folder / "output.txt", "a") as output:
        done = subprocess.run([sys.executable, script, *arguments, "--data-dir", data_dir], cwd=ROOT, env=environment,
                              stdout=output, stderr=subprocess.STDOUT, check=False)
    log, path = [], next(folder.glob("*/log.jsonl"), None)
    if path:
        log = [json.loads(line) for line in path.read_text().splitlines()]
        options, metrics = json.loads(path.with_name("options.json").read_text()), path.with_name("metrics.json")
    # 2: refused, perhaps because it is complete and has only lost its row.
    if done.returncode not in (0, 2) or not log or log[-1]["epoch"] < options["epochs"]:
        print(f"code {done.returncode}: {command}, seed {seed}; see {folder / 'output.txt'}", flush=True)
        return None
    scores = json.loads(metrics.read_text()) if metrics.exists() else {}     # none with --eval-interval 0
    apart = {name: scores.pop(name) for name in ("against", "real images", "perfect sampler") if name in scores}
    return {"command": command, "seed": seed, "seconds": round(sum(row["seconds"] for row in log), 3),
            "threads": options["threads"], "torch": options["torch"], "last": log[-1],
            "processor": torch.cuda.get_device_name() if options["device"] == "cuda" else processor(),
            **apart, "checkpoint": {name: value for name, value in scores.items() if name not in ("samples", "seed")}}


def run_all(names, data_dir, folder, jobs):
    """Run what has no row yet, `jobs` at a time with a share of the threads each, then measure; a row as each ends.

    Returns whether every run got its row.
    """
    wanted = [key for name in names for key in TABLES.get(name, ()) if key not in rows()]
    threads, lock = max(1, os.cpu_count() // jobs), threading.Lock()

    def work(key):
        row = run(*key, data_dir, folder, threads)
        if row:
            with lock:
                add_row(row)
            print(f"{row['seconds'] / 60:6.1f} min  {key[0]}, seed {key[1]}", flush=True)
        return bool(row)

    pool = ThreadPoolExecutor(jobs)
    try:
        complete = all(list(pool.map(work, dict.fromkeys(wanted))))
    finally:                                    # Ctrl-C reaches the runs, too, which save and end
        pool.shutdown(cancel_futures=True)
    for name in names:
        if name in MEASURES and (name, None) not in rows():
            add_row({"command": name, "seed": None, "threads": torch.get_num_threads(), "processor": processor(),
                     "found": MEASURES[name](data_dir, folder)})
    return complete


# -------------------------------------------------------------------------------------- measuring
def load(script):
    sys.path.insert(0, str(ROOT))
    return importlib.import_module(script)


def step_times(commands, data_dir, folder):
    """{command: milliseconds of a generator step}, alone on the machine, with all its threads.

    commands: {command: steps}. Each is trained for its steps, three times in turns; the median counts. A round
    before these warms up. 06 grows within these steps as in a whole training.
    """
    seconds = {command: [] for command in commands}
    for _ in range(4):
        for command, steps in commands.items():
            shutil.rmtree(folder / "timed", ignore_errors=True)
            flags = f" --epochs 1 --max-batches {steps} --eval-interval 0"
            row = run(command + flags, 0, data_dir, folder / "timed", os.cpu_count()) or sys.exit(1)
            seconds[command].append(row["seconds"] / steps)
    return {command: 1000 * statistics.median(found[1:]) for command, found in seconds.items()}


def times(data_dir, folder):
    """Of the default runs; with FAST a step takes as long as without."""
    steps = {"01": 500, "02": 30, "03": 100, "04": 100, "05": 30, "06": 100}
    commands = [command for command in DEFAULTS if not command.endswith(FAST)]
    return step_times({command: 20 if "conv" in command else steps[command[:2]] for command in commands}, data_dir, folder)


def costs(data_dir, folder):
    """Of the cures, on the eight Gaussians."""
    return step_times({f"{command} --dataset gaussians": 100 for command in CURES.values()}, data_dir, folder)


def updates(data_dir, folder):
    """Milliseconds that 実装例6's discriminator takes with this many threads: medians of 30, in turns.

    An update at batch 64 without and with spectral normalisation, and with 03's penalty and loss; and the scores
    alone, in eval mode.
    """
    five, three = load("05_sn_label_smoothing"), load("03_wgan_gp")
    torch.manual_seed(0)
    real, fake = torch.rand(2, 64, 1, 28, 28) * 2 - 1
    plain, normal = five.Discriminator(torch.nn.Identity()), five.Discriminator()
    optimizers = {network: torch.optim.Adam(network.parameters(), fused=True) for network in (plain, normal)}

    def update(network):
        five.discriminator_step(lambda z: fake, network, optimizers[network], real, None, "none")

    def score(network, images):
        with torch.no_grad():
            network.eval()(images)
        network.train()

    kinds = {
        "update": lambda: update(plain),
        "update, spectral normalisation": lambda: update(normal),
        "update, gradient penalty": lambda: three.critic_step(
            lambda z: fake, plain, optimizers[plain], real, None, gp_weight=10.0),
        "64 scores": lambda: score(plain, real),
        "64 scores, spectral normalisation": lambda: score(normal, real),
        "1 score": lambda: score(plain, real[:1]),
        "1 score, spectral normalisation": lambda: score(normal, real[:1]),
    }
    found = {name: [] for name in kinds}
    for _ in range(35):
        for name, function in kinds.items():
            start = time.perf_counter()
            function()
            found[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[5:]) for name, values in found.items()}


def mixing(data_dir, folder):
    """演習問題4: whose digit 2,000 mixtures of each of 06's runs show, as the classifier reads A, B and the mixture.

    By the block from which on B's style is taken, for each run: the shares that show A's digit, and B's, of the pairs in
    which A and B differ; and the share that shows A's under another noise.
    """
    found = {}
    for seed in range(3):
        for block, shares in mixing_of_run(seed, data_dir, folder).items():
            found.setdefault(block, []).append(shares)
    return found


def mixing_of_run(seed, data_dir, folder):
    six, common = load("06_stylegan_blocks"), load("common")
    checkpoint = next((folder / slug("06_stylegan_blocks.py", seed)).glob("*/checkpoint.pt"), None)
    if not checkpoint:
        sys.exit(f"mixing: the run of 06_stylegan_blocks.py, seed {seed}, is not in {folder}")
    content = common.load_checkpoint(checkpoint)
    options = argparse.Namespace(**{**content["options"], "data_dir": data_dir})
    generator = six.Generator(options.latent_dim, options.image_size, options.channels, options.width).eval()
    generator.load_state_dict(content["average"])
    scorer = common.make_scorer(options)
    torch.manual_seed(0)
    with torch.no_grad():
        a, b = generator.styles(torch.randn(2, 2000, options.latent_dim).flatten(0, 1)).chunk(2)

        def digits(styles, noise_seed=0):
            parts = (generator.synthesis(part, noise_seed) for part in styles.split(250))
            return scorer.read(parts)[1].argmax(1)

        digits_a, digits_b = digits(a), digits(b)
        differ, found = digits_a != digits_b, {}
        for block in range(1, len(generator.blocks)):
            mixed = digits(torch.cat([a[:, :block], b[:, block:]], 1))
            shares = [(mixed == digits_a)[differ], (mixed == digits_b)[differ]]
            found[block] = [share.double().mean().item() for share in shares]
        found["noise"] = [(digits(a, noise_seed=1) == digits_a).double().mean().item(), 0.0]
    return found


MEASURES = {"times": times, "costs": costs, "updates": updates, "mixing": mixing}


# ----------------------------------------------------------------------------------------- tables
def defaults_table(done):
    yield ["Command", "Seed", "Trained on", "Minutes", "Last epoch line", "Inception Score", "Frechet distance",
           "Precision, recall", "Rarest, most frequent digit"]
    for command, seed in TABLES["defaults"]:
        if row := done.get((command, seed)):
            scores, last = row["checkpoint"], row["last"]
            quantities = [f"{name} {last[name]:.3g}" for name in last
                          if name not in ("epoch", "step", "seconds", "layers", *scores)]
            asked = f"; {scores['as_asked']:.1%} as asked" if "as_asked" in scores else ""
            step = done.get(("times", None), {"found": {}})["found"].get(command.removesuffix(FAST))
            minutes = f"{step * last['step'] / 60_000:.0f}" if step else "-"
            yield [f"`{command}`", seed, row["processor"], minutes, ", ".join(quantities), f"{scores['IS']:.2f}",
                   f"{scores['FD']:.1f}", f"{scores['precision']:.2f}, {scores['recall']:.2f}{asked}",
                   rarest_and_most_frequent(scores["counts"])]


def rarest_and_most_frequent(counts):
    return f"{min(counts) / sum(counts):.1%}, {max(counts) / sum(counts):.1%}".replace("%", " %")


def spread(values, form):
    """The mean of several runs, and their standard deviation after a sign."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def points_cells(done, command):
    """Modes, share within three sigma, divergence, over the seeds that are done, and how many these are."""
    found = [done[key]["checkpoint"] for key in done if key[0] == command]
    return [spread([scores["modes"] for scores in found], ".1f"),
            spread([100 * scores["high_quality"] for scores in found], ".1f"),
            spread([scores["KL"] for scores in found], ".3f"), len(found)]


def cures_table(done):
    yield ["Cure", *(f"{mixture}: {what}" for mixture in MIXTURES for what in ("modes", "% within 3 sigma", "KL")),
           "Cost of a step"]
    costs = done.get(("costs", None), {"found": {}})["found"]
    for name, command in CURES.items():
        cost = costs.get(f"{command} --dataset gaussians", 0) / costs.get(f"{PLAIN} --dataset gaussians", 1)
        yield [name, *(cell for mixture in MIXTURES
                       for cell in points_cells(done, f"{command} --dataset {mixture}{STEPS}")[:3]),
               f"{cost:.1f}" if cost else "-"]


def settings_table(done):
    yield ["Command", "Modes", "% within 3 sigma", "KL", "Rarest mode"]
    for command, seed in TABLES["settings"]:
        if row := done.get((command, seed)):
            scores = row["checkpoint"]
            yield [f"`{command.removesuffix(STEPS)}`", scores["modes"], f"{100 * scores['high_quality']:.1f}",
                   spread([scores["KL"]], ".3f"), min(scores["counts"])]


def cures_mnist_table(done):
    yield ["Cure", "Inception Score", "Frechet distance", "Precision", "Recall", "Rarest, most frequent digit"]
    for name, command in CURES.items():
        if command[:2] == "05" and (row := done.get((command, 0))):
            scores = row["checkpoint"]
            yield [name, f"{scores['IS']:.2f}", f"{scores['FD']:.1f}", f"{scores['precision']:.2f}",
                   f"{scores['recall']:.2f}", rarest_and_most_frequent(scores["counts"])]


def published_table(done):
    yield ["Command", "Modes", "% within 3 sigma", "KL", "Seeds"]
    for command in dict.fromkeys(command for command, _ in TABLES["published"]):
        yield [f"`{command}`", *points_cells(done, command)]


def updates_table(done):
    yield ["", "Milliseconds", "Beside the plain one"]
    found = done.get(("updates", None), {"found": {}})["found"]
    for name, value in found.items():
        yield [name, f"{value:.1f}", f"{value / found[name.partition(',')[0]] - 1:+.0%}"]


def mixing_table(done):
    yield ["B takes over at", "A's digit", "B's digit", "Another digit"]
    for block, runs in done.get(("mixing", None), {"found": {}})["found"].items():
        size = 4 * 2**int(block) if block != "noise" else 0
        shares = zip(*([100 * a, 100 * b, 100 * (1 - a - b)] for a, b in runs))
        yield [f"{size}x{size}" if size else "nowhere, but another noise", *(f"{spread(share, '.1f')} %" for share in shares)]


def with_tables(text):
    """The document with each table, as the rows have it, between its marks."""
    done = rows()
    for name in [*TABLES, "updates", "mixing"]:
        head, *body = globals()[name.replace("-", "_") + "_table"](done)
        lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in [head, ["---"] * len(head), *body]]
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{mark}\n" + "\n".join(lines) + f"\n\n{end}{after}"
    return text


# --------------------------------------------------------------------------------------- pictures
def draw(name, columns, panels, folder, box=(0, 0, 1, 1), dpi=64):
    """docs/NAME.png: {title: (command, seed)} as panels, the last epoch's picture of each run that has a row.

    box: the part of the picture that is shown, left, top, right, bottom, as fractions.
    """
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    found = {title: max((folder / slug(*key)).glob("*/samples/epoch_*.png"), default=None)
             for title, key in panels.items() if key in rows()}
    if not found or not all(found.values()):
        return
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.7 * lines), layout="constrained")
    for axes in figure.subplots(lines, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, (title, path) in zip(figure.axes, found.items()):
        pixels = imread(path)
        left, top, right, bottom = (round(part * size) for part, size in zip(box, pixels.shape[1::-1] * 2))
        axes.imshow(pixels[top:bottom, left:right])
        axes.set_title(title, fontsize=8)
    figure.savefig(DOCS / f"{name}.png", dpi=dpi)


def pictures(folder):
    """samples.png, cures.png, cures-mnist.png, and the gallery: pictures of the runs, as they are."""
    for name, (key, file) in GALLERY.items():
        if path := next((folder / slug(*key)).glob(f"*/samples/{file}"), None):
            shutil.copyfile(path, DOCS / "gallery" / (name + path.suffix))
    scripts = {command.removesuffix(".py"): (command, 0) for command in DEFAULTS if " " not in command}
    if all(key in rows() for key in scripts.values()):
        draw("samples", 3, scripts, folder, dpi=100)
    draw("cures", 6, {f"{name}: {mixture}": (f"{command} --dataset {mixture}{STEPS}", 0)
                      for name, command in CURES.items() for mixture in MIXTURES}, folder, (0.07, 0.01, 1, 0.94))
    draw("cures-mnist", 3, {name: (command, 0) for name, command in CURES.items() if command[:2] == "05"}, folder, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"of {', '.join([*TABLES, *MEASURES])}; all without it. The last {len(MEASURES)} are "
                        "measured after the runs; leave the machine alone meanwhile")
    parser.add_argument("--data-dir", default="data", help="as in the scripts")
    parser.add_argument("--jobs", type=int, choices=range(1, 65), default=2, metavar="N",
                        help="runs at a time; they share the processor's cores")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    args = parser.parse_args()
    if unknown := set(args.names) - {*TABLES, *MEASURES}:
        parser.error(f"no {', '.join(unknown)}; there are {', '.join([*TABLES, *MEASURES])}")
    folder, complete = ROOT / "runs" / "results", True
    if not args.tables:
        complete = run_all(args.names or [*TABLES, *MEASURES], Path(args.data_dir).resolve(), folder, args.jobs)
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    pictures(folder)
    sys.exit(not complete)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
