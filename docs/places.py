"""Writes coverage.md's table of places: for each section and listing of the text, the code.

    python docs/places.py

The marks are the sources' own: a docstring or comment that names a place of the text (11.2.2, 実装例5,
演習問題4) leads from that place to the function or class that it stands in.
"""

import ast
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT, DOCUMENT = DOCS.parent, DOCS / "coverage.md"
PLACES = {
    "11.1.1": "原理と活用方法", "11.1.2": "色々な GAN", "11.2.1": "GAN の学習の手順", "11.2.2": "GAN の実装",
    "11.2.3": "GAN の問題点", "11.3": "WGAN-gp", "11.3.1": "WGAN-gp とは", "11.3.2": "WGAN-gp の実装", "11.4": "CGAN",
    "11.4.1": "CGAN とは", "11.4.2": "CGAN の実装",
    "3.1": "GANの基本概念", "実装例1": "Vanilla GAN基本構造",
    "3.2": "GANの学習アルゴリズム", "実装例2": "GAN訓練ループ", "実装例3": "Mode Collapse可視化",
    "3.3": "DCGAN", "実装例4": "DCGAN Generator",
    "3.4": "訓練テクニック", "実装例5": "WGAN-GP実装", "実装例6": "Spectral Normalization適用",
    "3.5": "StyleGAN概要", "実装例7": "StyleGAN簡易版",
    "3.6": "実践:画像生成プロジェクト", "実装例8": "完全な画像生成パイプライン",
    "演習問題1": "Nash均衡の理解", "演習問題2": "Mode Collapseの検出と対策",
    "演習問題3": "WGAN-GPとSpectral Normalizationの比較", "演習問題4": "StyleGANのスタイル混合",
    "演習問題5": "GANの評価指標",
    "000": "GAN(敵対的生成ネットワーク)のPython実装", "002": "Keras", "003": "GANsに関して",
}
# "sec. 3.2 of arXiv 1606.03498" is a section of a paper, no place of the text.
PLACE = re.compile(r"(?<![\w.,])(?<!sec\. )(?:11\.[1-4](?:\.[1-3])?|3\.[1-6]|00[023]|(?:実装例|演習問題)[1-8])(?![.\d]*\d)")
SEVERAL = re.compile(r"(実装例|演習問題|3\.)(\d)(?:-3\.| (to|and|or) )(\d)(?![.\d])")


def places(text):
    """The places of the text that some lines name, "実装例1 to 3" written out."""
    def each(match):
        name, first, word, last = match.groups()
        numbers = [first, last] if word in ("and", "or") else range(int(first), int(last) + 1)
        return " ".join(f"{name}{number}" for number in numbers)

    return {place for place in PLACE.findall(SEVERAL.sub(each, text)) if place in PLACES}


def marks(path):
    """(place, name) for all that a source marks: the name of a function, class or constant, "" for the script."""
    source = path.read_text(encoding="utf-8")
    lines, module = source.splitlines(), ast.parse(source)
    for place in places(ast.get_docstring(module)):
        yield place, ""
    for node in module.body:
        name = getattr(node, "name", None) or getattr(getattr(node, "targets", [None])[0], "id", None)
        if name:
            start = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
            while lines[start - 2].startswith("#") and "----" not in lines[start - 2]:
                start -= 1                          # the comment above it
            words = [ast.get_docstring(each) or "" for each in ast.walk(node)
                     if isinstance(each, ast.ClassDef | ast.FunctionDef)]
            words += [line.partition("#")[2] for line in lines[start - 1:node.end_lineno]]
            for place in places("\n".join(words)):
                yield place, name


def anchor(heading):
    """The name that GitHub gives a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def table():
    """The rows: place, title, code, errata."""
    found = {place: {} for place in PLACES}         # {place: {file: names}}
    for path in [*sorted(ROOT.glob("0*.py")), ROOT / "common.py"]:
        for place, name in marks(path):
            names = found[place].setdefault(f"[`{path.name}`](../{path.name})", [])
            names += [f"`{name}`"] if name else []
    exercises = (DOCS / "exercises.md").read_text(encoding="utf-8")
    for heading in re.findall(r"^## (.*)$", exercises, re.MULTILINE):
        for place in places(heading):
            found[place][f"[exercises](exercises.md#{anchor(heading)})"] = []
    errata = [line.split(" | ")[:2] for line in (DOCS / "errata.md").read_text(encoding="utf-8").splitlines()
              if re.match(r"\| \d+ ", line)]
    for place, title in PLACES.items():
        code = [f"{file}: {', '.join(names)}" if names else file for file, names in found[place].items()]
        numbers = [number.strip("| ") for number, where in errata if place in places(where)]
        yield place, title, "; ".join(code) or "named only", ", ".join(numbers) or "-"


def with_table(text):
    """The document with the table between its marks."""
    before, mark, rest = text.partition("<!-- places -->\n")
    _, end, after = rest.partition("<!-- end -->")
    rows = [("Place", "Title", "Code", "Errata"), ("---",) * 4, *table()]
    return before + mark + "\n" + "".join("| " + " | ".join(row) + " |\n" for row in rows) + "\n" + end + after


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
