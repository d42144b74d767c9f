"""The documents keep up with the code: marks and rows of the errata, commands, links, tables, names and flags."""

import itertools
import operator
import re
import shlex
import unicodedata

import pytest

import common
from conftest import ROOT, SCRIPTS, load_script


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


SOURCES = {name: read(name) for name in ["common.py", *(f"{script}.py" for script in SCRIPTS)]}


def test_errata_and_marks_match():
    """Each `erratum N` in a source is a row that names the file, and each file of a row holds the mark."""
    rows = {}
    for line in re.findall(r"^\| \d+ \|.*", read("docs/errata.md"), re.MULTILINE):
        number, *cells, names = line.strip("| ").split(" | ")
        assert len(cells) == 4 and all(cells), line
        rows[int(number)] = set(names.split()) - {"-"}
    assert list(rows) == list(range(1, len(rows) + 1)) and len(rows) > 10
    marked = {(int(number), name) for name, text in SOURCES.items() for number in re.findall(r"erratum (\d+)", text)}
    assert marked == {(number, name) for number, names in rows.items() for name in names}


def numbers(prose):
    return sorted(re.findall(r"\d[\d,.]*(?<=\d)", prose))


def test_both_readmes_say_the_same():
    """Commands, what is quoted from screens and code, links and numbers; at most 130 lines each."""
    assert "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest\n" in read(".ci/run")

    def facts(name):
        text = read(name)
        assert len(text.splitlines()) <= 130
        blocks = [line.partition("#")[0].strip() for block in re.findall(r"```\w+\n(.*?)```", text, re.DOTALL)
                  for line in block.splitlines()]
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        links = {link.partition("#")[0].replace(".ja.md", ".md") for link in re.findall(r"\]\(([^)]+)\)", prose)}
        prose = re.sub(r"\[[^\]]*\.md\]|\]\([^)]+\)", "", prose)
        assert "pip install -r requirements.txt && python 01_vanilla_gan.py --epochs 10" in blocks
        return blocks, links, sorted(re.findall(r"`[^`]+`", prose)), numbers(re.sub("`[^`]+`", "", prose))

    for english, japanese in zip(facts("README.md"), facts("README.ja.md"), strict=True):
        assert english == japanese


@pytest.mark.parametrize("name", ["errata", "exercises"])
def test_japanese_documents_have_the_figures_of_the_english_ones(name):
    english, japanese = (re.sub(r"\]\([^)]+\)", "", read(f"docs/{name}{language}.md")) for language in ("", ".ja"))
    assert numbers(english) == numbers(japanese)
    rows, same = (re.findall(r"^\|.*\|$", text, re.MULTILINE) for text in (english, japanese))
    assert [row.count(" | ") for row in rows] == [row.count(" | ") for row in same] and len(rows) > 60
    assert re.findall(r"```.*?```", english, re.DOTALL) == re.findall(r"```.*?```", japanese, re.DOTALL)


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_are_understood(script, monkeypatch, tmp_path, capsys):
    """Those of the documents, in blocks and as inline code, and of results.py get as far as the work or a run."""
    commands = {f"python {command}" for runs in load_script("docs/results").TABLES.values() for command, _ in runs}
    for document in ("README.md", "docs/runs.md", "docs/exercises.md", "docs/results.md"):
        text = read(document)
        for line in "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines():
            commands |= {command.strip() for command in line.partition("#")[0].split("&&")}
        commands |= set(re.findall(r"`(python 0[^`]+)`", text))

    class Reached(Exception):
        pass

    def stop(*arguments, **settings):
        raise Reached

    for name in ("Run", "compare_kernels"):
        monkeypatch.setattr(common, name, stop)
    monkeypatch.chdir(tmp_path)
    own = sorted(command for command in commands if command.startswith(f"python {script}.py"))
    assert own
    for command in own:
        arguments = shlex.split(command)[2:]
        needs_run = not {"--from", "--resume"}.isdisjoint(arguments)
        try:
            load_script(script).main(arguments)
        except Reached:
            assert not needs_run, command
        except SystemExit:
            message = capsys.readouterr().err
            assert needs_run and ("is not there" in message or "there is no run" in message), (command, message)


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_links_exist(path):
    """Files, and the headings in them; no link counts lines, which any edit moves."""
    for link in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [load_script("docs/places").anchor(heading) for heading in headings], link


def help_of(script, capsys):
    with pytest.raises(SystemExit):
        load_script(script).main(["--help"])
    return capsys.readouterr().out


def test_coverage_is_complete_and_names_what_exists(capsys):
    """Items, each with an answer; a file, function, class or flag that it gives exists."""
    items = read("docs/coverage.md").partition("\n## Every item\n")[2]
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", items, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1)) and len(rows) > 40
    for number, row in rows:
        answer = row.split(" | ")[-1]
        assert "`" in answer or "named only" in answer, number
        for file, names in re.findall(r"`([\w/]+\.(?:py|md))`(?:: ((?:`[^`]+`(?:, )?)+))?", answer):
            assert (ROOT / file).exists(), file
            for name in re.findall(r"`([^`]+)`", names):
                script = file.removesuffix(".py")
                if name.startswith("--"):
                    assert re.search(rf"^  {name}\b", help_of(script, capsys), re.MULTILINE), (number, name)
                else:
                    operator.attrgetter(name)(common if script == "common" else load_script(script))


def test_every_place_of_the_text_leads_to_code():
    """The table of places is that of the sources' marks; each listing leads to a function or class."""
    places = load_script("docs/places")
    text = places.DOCUMENT.read_text(encoding="utf-8")
    assert places.with_table(text) == text, "python docs/places.py"
    rows = list(places.table())
    assert [place for place, _, code, _ in rows if code == "named only"] == ["11.1.2"]
    assert all("): `" in code for place, _, code, _ in rows if place.startswith("実装例"))
    assert places.places("実装例1 to 3, 演習問題2 and 3; 3.1-3.2; sec. 3.3 of StyleGAN; sec. 3.4 of arXiv 1606.03498; 3.65") == {
        "実装例1", "実装例2", "実装例3", "演習問題2", "演習問題3", "3.1", "3.2"}


def test_the_glossary_names_what_the_sources_have():
    names = re.findall(r"`([^`]+)`", read("docs/coverage.md").partition("\n## Glossary\n")[2])
    sources = "\n".join(SOURCES.values())
    assert len(names) > 30
    for part in " ".join(names).split():
        assert re.search(rf"(?<!\w){part}(?!\w)", sources), part


def test_the_lines_of_the_kernels_are_those_of_the_sources():
    head, *rows = re.findall(r"^\|[^|]*\| `([^|]*)` \| `([^|]*)` \|$", read("docs/kernels.md"), re.MULTILINE)
    assert head == ("cpu.cpp", "cuda.cu") and len(rows) == 8
    for file, lines in zip(head, zip(*rows)):
        assert all(line in read(f"csrc/{file}") for line in lines), file


def test_tables_of_the_results_are_those_of_the_rows():
    """And each row is of a run that results.py knows, so that the commands and the document keep up with it."""
    results = load_script("docs/results")
    text = results.DOCUMENT.read_text(encoding="utf-8")
    assert results.with_tables(text) == text and text.count("<!-- end -->") == len(results.TABLES) + 2
    known = {*itertools.chain(*results.TABLES.values()), *((name, None) for name in results.MEASURES)}
    assert known >= results.rows().keys() and len(results.rows()) == len(read("docs/results.jsonl").splitlines())


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stand_alone(script, capsys):
    """No script imports another; sections in the order of the text, groups in --help; at most 100 columns."""
    source = SOURCES[f"{script}.py"]
    assert set(re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)) <= {"math", "torch", "common"}
    assert source.endswith('\n\nif __name__ == "__main__":\n    common.guarded(main)\n')
    sections = re.findall(r"^# -+ ([a-z, ]+)$", source, re.MULTILINE)
    usual = ["hyperparameters", "networks", "losses", "training step", "main"]
    assert [section for section in sections if section != "style pictures"] == usual
    titles = re.findall(r"^(\w.*):$", help_of(script, capsys).split("\nText:")[0], re.MULTILINE)
    assert titles == ["options", "training", "output", common.SAMPLING]
    for line in source.splitlines():  # of which a Japanese character takes two
        assert sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line) <= 100, line


def test_04_is_03_but_for_what_the_text_changes():
    """At most 25 lines of networks, losses and steps are new, and every new line of code is marked."""
    def lines(script):
        part = SOURCES[f"{script}.py"].partition("- networks\n")[2].partition("- main\n")[0]
        return [line.strip() for line in part.splitlines() if line.strip()]

    known = set(lines("03_wgan_gp"))
    new = [line for line in lines("04_cgan") if line not in known]
    assert len(new) <= 25
    assert [line for line in new if "11.4" not in line and not line.startswith('"""')] == []
