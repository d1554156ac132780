"""The Python of the pages runs as it stands, and their links lead somewhere.

The README and experiments.md, whose blocks take names of their own, have test_readme.py.
"""

import ast
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
WRITTEN = [*PAGES, *ROOT.glob("*.md"), ROOT / "bench/README.md"]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^\n)((?:^ {4}[^\n]*\n|^\n)+)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s#:]+)?(#[^)\s]+)?\)")


def blocks(page, language="python"):
    return [code for name, code in FENCE.findall(page.read_text()) if name == language]


WITH_CODE = [page for page in PAGES if blocks(page) and page.name != "experiments.md"]


@pytest.mark.usefixtures("one_thread", "alone")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_python_of_a_page_runs(page, example_names):
    """Block after block, in a reader's order: what one defines the next may use."""
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), example_names)


def test_the_pages_have_code():
    assert {page.stem for page in WITH_CODE} >= {"index", "training", "distributed", "kernels"}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_python_is_marked_as_such(page):
    """A block that is Python by its looks has a fence, and so is run."""
    text = FENCE.sub("", page.read_text())
    for block in INDENTED.findall(text):
        try:
            tree = ast.parse(textwrap.dedent(block))
        except SyntaxError:
            continue
        kinds = {type(node) for node in ast.walk(tree)}
        assert not kinds & {ast.Call, ast.Import, ast.ImportFrom, ast.Assign}, block


def anchor(heading):
    """As GitHub and the site make it."""
    words = re.sub(r"[`*\[\]]|\([^)]*\.md[^)]*\)", "", heading).strip().lower()
    return "#" + re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_links_between_files(page):
    """Each leads to a file of the repository, a notebook's to what it is made from."""
    for target, section in LINK.findall(FENCE.sub("", page.read_text())):
        place = (page.parent / target).resolve() if target else page
        if place.parent.name == "notebooks":
            place = place.with_suffix(".py")
        assert place.exists(), f"{page.name} links to {target}"
        if section and place.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", place.read_text()), re.MULTILINE)
            assert section in map(anchor, headings), f"{page.name} links to {target}{section}"
