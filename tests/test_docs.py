"""The documents keep up with the code: marks and rows of the errata, commands and flags of the README."""

import re
import shlex

import pytest

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


def readme_commands():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [command.strip() for block in blocks for line in block.splitlines()
            for command in line.partition("#")[0].split("&&") if command.strip()]


def test_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -r requirements.txt && python 03_wgan_gp.py --epochs 5\n" in text
    assert "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest\n" in text
    assert "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [command for command in readme_commands() if command.startswith("python 0")])
def test_readme_commands_are_understood(command, monkeypatch, capsys):
    """Every command gets as far as the work; of those that need a run, every flag is in --help."""
    class Reached(Exception):
        pass

    def prepare(*arguments, **settings):
        raise Reached

    _, script, *arguments = shlex.split(command)
    monkeypatch.setattr("common.prepare", prepare)
    with pytest.raises(SystemExit if "--from" in arguments else Reached):
        load_script(script.removesuffix(".py")).main(["--help"] if "--from" in arguments else arguments)
    text = capsys.readouterr().out
    for flag in [argument for argument in arguments if argument.startswith("--") and "--from" in arguments]:
        assert re.search(rf"^  {flag}\b", text, re.MULTILINE), f"{script} has no {flag}"


def test_readme_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)]+)\)", text)
    assert links and all((ROOT / link).exists() for link in links)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stand_alone(script):
    """No script imports another; the sections stand in the order of the text."""
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    imports = set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE))
    assert imports <= {"math", "torch", "common"}
    sections = re.findall(r"^# -+ ([a-z ]+)$", source, re.MULTILINE)
    assert sections == ["hyperparameters", "networks", "losses", "training step", "main"]
