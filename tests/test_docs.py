"""The documents keep up with the code: marks and rows of the errata, commands and flags of the README."""

import importlib.util
import itertools
import operator
import re
import shlex
import unicodedata
from argparse import Namespace

import pytest

import common
from conftest import ROOT, SCRIPTS, load_script

SOURCES = [ROOT / "common.py", *(ROOT / f"{script}.py" for script in SCRIPTS)]


def test_errata_and_marks_match():
    """Each `erratum N` in a source is a row that names the file, and each file of a row holds the mark."""
    rows = {}
    for line in (ROOT / "docs" / "errata.md").read_text(encoding="utf-8").splitlines():
        if re.match(r"\| \d+ \|", line):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            assert len(cells) == 6 and all(cells), line
            rows[int(cells[0])] = set(cells[-1].split()) - {"-"}
    assert list(rows) == list(range(1, len(rows) + 1)) and len(rows) > 10
    marked = {(int(number), path.name) for path in SOURCES for number in re.findall(r"erratum (\d+)", path.read_text(encoding="utf-8"))}
    assert marked == {(number, name) for number, names in rows.items() for name in names}


def load_module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results():
    return load_module("results")


def commands():
    """Every command of the README, the exercises and the results: in blocks, as inline code, and what results.py runs."""
    found = [f"python {command}" for runs in load_module("results").TABLES.values() for command, _ in runs]
    for document in ("README.md", "docs/runs.md", "docs/exercises.md", "docs/results.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            found += [command.strip() for line in block.splitlines() for command in line.partition("#")[0].split("&&")]
        found += re.findall(r"`(python 0[^`]+)`", text)
    return sorted({command for command in found if command.startswith("python 0")})


def test_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -r requirements.txt && python 01_vanilla_gan.py --epochs 20\n" in text
    assert "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest\n" in text
    assert "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_both_readmes_say_the_same():
    """Commands, what is quoted from screens and code, links and numbers, in one order; at most 120 lines each."""
    def facts(name):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 120
        blocks = [line.partition("#")[0].strip() for block in re.findall(r"```\w+\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        links = re.findall(r"\]\(([^)]+)\)", prose.replace("README.ja.md", "README.md"))
        prose = re.sub(r"\]\([^)]+\)", "", prose)
        return blocks, links, sorted(re.findall(r"`[^`]+`", prose)), sorted(re.findall(r"\d[\d,.]*(?<=\d)", re.sub("`[^`]+`", "", prose)))

    for english, japanese in zip(facts("README.md"), facts("README.ja.md"), strict=True):
        assert english == japanese


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command, monkeypatch, capsys):
    """Every command gets as far as the work; of those that need a run, every flag is in --help."""
    class Reached(Exception):
        pass

    def prepare(*arguments, **settings):
        raise Reached

    _, script, *arguments = shlex.split(command)
    monkeypatch.setattr("common.prepare", prepare)
    needs_run = not {"--from", "--resume"}.isdisjoint(arguments)
    with pytest.raises(SystemExit if needs_run else Reached):
        load_script(script.removesuffix(".py")).main(["--help"] if needs_run else arguments)
    text = capsys.readouterr().out
    for flag in [argument for argument in arguments if argument.startswith("--") and needs_run]:
        assert re.search(rf"^  {flag}\b", text, re.MULTILINE), f"{script} has no {flag}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_command_of_the_readme_trains(script, tmp_path, monkeypatch, capsys):
    """The first of each script, on digits and for one step."""
    command = next(command for command in re.findall(rf"^(?:pip .* && )?python {script}.py(.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
                   if not re.search("--(from|resume|compare)", command))
    short = ["--epochs", "1", "--max-batches", "1", "--batch-size", "4", "--dataset", "digits", "--data-dir", "data", "--eval-interval", "0"]
    monkeypatch.setattr(common.Run, "_final_pictures", lambda run: None)  # for speed, as are few digits
    draw = common.draw_digits
    monkeypatch.setattr(common, "draw_digits", lambda split: tuple(part[:100] for part in draw(split)))
    load_script(script).main([*shlex.split(command, comments=True), *short, "--output-dir", str(tmp_path)])
    assert "epoch 1/1" in capsys.readouterr().out and list(tmp_path.glob("*/samples/epoch_0001.png"))


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_links_exist(path):
    """Files, and the headings and lines in them."""
    for link in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if re.fullmatch(r"L\d+", anchor):
            assert int(anchor[1:]) <= len(target.read_text(encoding="utf-8").splitlines()), link
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [load_module("places").anchor(heading) for heading in headings], link


def test_tables_of_the_results_are_those_of_the_rows(results):
    """And each row is of a run that results.py knows, so that the commands and the document keep up with it."""
    text = results.DOCUMENT.read_text(encoding="utf-8")
    assert results.with_tables(text) == text and text.count("<!-- end -->") == len(results.TABLES) + 2
    known = {*itertools.chain(*results.TABLES.values()), *((name, None) for name in results.MEASURES)}
    assert len(results.rows()) == len(results.ROWS.read_text(encoding="utf-8").splitlines()) and known >= results.rows().keys()


def test_results_run_and_go_on(results, tmp_path, monkeypatch):
    """A run gives a row, whether it runs through, goes on from a checkpoint, or had ended already; it runs but once."""
    command = "01_vanilla_gan.py --dataset gaussians --epochs 2 --max-batches 2"
    monkeypatch.setattr(results, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(results, "TABLES", {"some": [(command, 0), (command, 1)]})
    results.run_all(["some"], tmp_path, tmp_path, jobs=2)
    rows = results.rows()
    assert rows.keys() == {(command, 0), (command, 1)}
    row = rows[command, 1]
    assert row["last"]["step"] == 4 and row["seconds"] > 0 and sum(row["checkpoint"]["counts"]) == round(2500 * row["checkpoint"]["high_quality"])
    assert row["last"]["loss_D"] != rows[command, 0]["last"]["loss_D"] and row["perfect sampler"]["modes"] == 8
    results.run_all(["some"], tmp_path, tmp_path, jobs=2)
    assert len(results.ROWS.read_text().splitlines()) == 2
    again = results.run(command, 1, tmp_path, tmp_path, threads=row["threads"] + 1)
    assert again == row, "it was complete and had lost its row; other threads than at its start are not taken"
    log = next((tmp_path / results.slug(command, 1)).glob("*/log.jsonl"))
    log.write_text(log.read_text().splitlines()[0] + "\n")
    assert results.run(command, 1, tmp_path, tmp_path, threads=row["threads"]) is None, "refused and not complete: no row"
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(results.subprocess, "run", lambda command, **_: seen.append(command) or Namespace(returncode=2))
        patch.setattr(results, "TABLES", {"some": [("01_vanilla_gan.py --epochs 1", 0)]})
        assert not results.run_all(["some"], tmp_path, tmp_path, jobs=1), "which the exit code says"
    assert seen[0][2:6] == ["--epochs", "1", "--dataset", "mnist"], "no other digits under its name"


def help_of(script, capsys):
    with pytest.raises(SystemExit):
        load_script(script).main(["--help"])
    return capsys.readouterr().out


def test_coverage_is_complete_and_names_what_exists(capsys):
    """86 items, each with an answer; a file, function, class or flag that it gives exists."""
    items = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8").partition("\n## Every item\n")[2]
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", items, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 87))
    checked = 0
    for number, row in rows:
        answer = row.split(" | ")[-1]
        assert "`" in answer or "named only" in answer, number
        for file, names in re.findall(r"`([\w/]+\.(?:py|md))`(?:: ((?:`[^`]+`(?:, )?)+))?", answer):
            assert (ROOT / file).exists(), file
            module = common if file == "common.py" else load_script(file.removesuffix(".py")) if file.endswith(".py") else None
            for name in re.findall(r"`([^`]+)`", names):
                if name.startswith("--"):
                    assert re.search(rf"^  {name}\b", help_of(file.removesuffix(".py"), capsys), re.MULTILINE), (number, name)
                else:
                    assert operator.attrgetter(name)(module) is not None
                checked += 1
        assert len(re.findall("`", answer)) % 2 == 0
    assert checked > 100


def test_every_place_of_the_text_leads_to_code():
    """The table of places is that of the sources' marks; each listing and exercise leads somewhere."""
    places = load_module("places")
    text = places.DOCUMENT.read_text(encoding="utf-8")
    assert places.with_table(text) == text, "python docs/places.py"
    rows = list(places.table())
    assert [place for place, _, code, _ in rows if code == "named only"] == ["11.1.2"]
    assert all("#L" in code for place, _, code, _ in rows if place.startswith("実装例"))
    assert places.places("実装例1 to 3, 演習問題2 and 3; 3.1-3.2; StyleGAN, 3.1; arXiv 1606.03498, 3.2; 10,000; 3.65") == {
        "実装例1", "実装例2", "実装例3", "演習問題2", "演習問題3", "3.1", "3.2"}


def test_the_glossary_names_what_the_sources_have():
    glossary = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8").partition("\n## Glossary\n")[2]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    names = re.findall(r"`([^`]+)`", glossary)
    assert len(names) > 30 and [name for name in names if not all(re.search(rf"(?<!\w){part}(?!\w)", sources) for part in name.split())] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stand_alone(script):
    """No script imports another; the sections stand in the order of the text."""
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    imports = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert imports <= {"math", "torch", "common"}
    assert source.endswith('\n\nif __name__ == "__main__":\n    common.guarded(main)\n')
    sections = re.findall(r"^# -+ ([a-z, ]+)$", source, re.MULTILINE)
    expected = ["hyperparameters", "networks", "losses", "training step", "main"]
    own = {"03_wgan_gp": ["same, faster"], "04_cgan": ["same, faster"], "06_stylegan_blocks": ["style pictures"]}
    assert sections == expected[:4] + own.get(script, []) + ["main"]


def sections(script, first, last):
    """The lines of a script from one section to another, without indentation and blank lines."""
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    part = source[source.index(f"- {first}\n"):source.index(f"- {last}\n")].partition("- same, faster\n")[0]
    return [line.strip() for line in part.splitlines() if line.strip()]


def test_04_is_03_but_for_what_the_text_changes():
    """At most 25 lines of networks, losses and steps are new, and every new line of code is marked."""
    known = set(sections("03_wgan_gp", "networks", "main"))
    new = [line for line in sections("04_cgan", "networks", "main") if line not in known]
    assert len(new) <= 25
    unmarked = [line for line in new if "11.4" not in line and not line.startswith('"""')]
    assert not unmarked


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_panes_side_by_side_do_not_wrap(script):
    """At most 100 columns, of which a Japanese character takes two."""
    for number, line in enumerate((ROOT / f"{script}.py").read_text(encoding="utf-8").splitlines(), start=1):
        assert sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line) <= 100, (number, line)


def test_the_lines_of_the_kernels_are_those_of_the_sources():
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    head, *rows = re.findall(r"^\|[^|]*\| `([^|]*)` \| `([^|]*)` \|$", text, re.MULTILINE)
    assert head == ("cpu.cpp", "cuda.cu") and len(rows) == 8
    for file, lines in zip(head, zip(*rows)):
        source = (ROOT / "csrc" / file).read_text(encoding="utf-8")
        assert all(line in source for line in lines), file


def test_csrc_knows_nothing_of_common():
    for path in (ROOT / "csrc").glob("*.py"):
        assert not re.search(r"^\s*(import|from) common\b", path.read_text(encoding="utf-8"), re.MULTILINE), path


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_grouped(script, capsys):
    """Six flags first, then the groups; each script's own flags stand in one of them."""
    text = help_of(script, capsys)
    fused = ["fused kernels"] * (script in ("03_wgan_gp", "04_cgan", "06_stylegan_blocks"))
    titles = ["options", "training", "data", "output and scores", *fused, "drawing from a run, with --from"]
    assert re.findall(r"^(\w.*):$", text.split("\nText:")[0], re.MULTILINE) == titles
    first = re.findall(r"^  (?:-h, )?(--[\w-]+)", text.split("\ntraining:")[0], re.MULTILINE)
    assert first == ["--help", "--epochs", "--dataset", "--data-dir", "--output-dir", "--from", "--resume"]
