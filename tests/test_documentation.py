"""The built site: it asks no other host for anything, and its formulas are MathML."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")

ROOT = Path(__file__).parents[1]
# what a browser fetches by itself; an <a href> is followed by a click alone
FETCHED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data"}
ELSEWHERE = re.compile(r"\s*(?:https?:)?//", re.IGNORECASE)
IN_STYLES = re.compile(r"""(?:url\(|@import)\s*['"]?((?:https?:)?//[^'")\s]+)""", re.IGNORECASE)
MATH = re.compile(r"<math.*?</math>", re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def fetched_from_elsewhere(page: str) -> list[str]:
    found = IN_STYLES.findall(page)

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            address = dict(attributes).get(FETCHED.get(tag, "")) or ""
            if ELSEWHERE.match(address):
                found.append(address)

    Reader().feed(page)
    return found


def pages(site: Path) -> dict[str, str]:
    return {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.html")}


def test_no_page_asks_another_host(site):
    found = {path.name: fetched_from_elsewhere(path.read_text()) for path in [*site.rglob("*.html")]}
    found |= {path.name: IN_STYLES.findall(path.read_text()) for path in site.rglob("*.css")}
    assert len(found) > 5
    assert {name: addresses for name, addresses in found.items() if addresses} == {}


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://cdn.example/mathjax.js"></script>',
        "<link rel='stylesheet' href='//fonts.example/css'>",
        '<img alt="a badge" src="http://badges.example/b.svg"/>',
        "<style>@import 'https://fonts.example/css';</style>",
        '<style>@font-face { src: url("https://fonts.example/a.woff2") }</style>',
    ],
)
def test_what_would_be_fetched_is_found(page):
    assert fetched_from_elsewhere(page)


@pytest.mark.parametrize("page", ['<a href="https://example.org">a link</a>', '<img src="../plots/a.png">'])
def test_links_and_own_files_stay(page):
    assert not fetched_from_elsewhere(page)


def test_every_formula_is_mathml(site):
    shown = pages(site)
    for name, page in shown.items():
        assert not re.search(r"\.\. math::|:math:|\\[\[\](]|arithmatex", page), name
        for formula in MATH.findall(page):
            assert "\\" not in formula, f"{name}: a command that isn't known: {formula}"
    for name, least in (("index.html", 1), ("op/index.html", 30), ("kernels/index.html", 20)):
        assert len(MATH.findall(shown[name])) >= least, name


def test_the_docstrings_formulas_are_in_the_api(site):
    """The op's, and both of the norm's, in the running text."""
    formulas = MATH.findall(pages(site)["api/index.html"])
    assert [('display="block"' in formula) for formula in formulas] == [True, True, False, False]


def test_no_table_s_escapes_are_shown(site):
    for name, page in pages(site).items():
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", page, flags=re.DOTALL)
        assert not re.search(r"\\[<>*_|&]|\\&[lg]t;", text), name
