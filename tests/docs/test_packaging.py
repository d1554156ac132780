"""What says the same in several files of the package says the same."""

import re
import tomllib
from pathlib import Path

import iada

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RECIPE = (ROOT / "recipe" / "recipe.yaml").read_text()
CITATION = (ROOT / "CITATION.cff").read_text()


def test_one_version():
    assert f'version: "{iada.__version__}"' in RECIPE
    assert f"\nversion: {iada.__version__}\n" in CITATION
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(iada.__version__)}\b", changelog, re.MULTILINE)


def test_the_recipe_needs_what_the_package_needs():
    (needed,) = re.findall(r"^  run:\n((?:    - .*\n)+)", RECIPE, re.MULTILINE)
    needed = {
        line.strip("- ").replace("pytorch", "torch").replace(" ", "")
        for line in needed.splitlines()
    }
    python = f"python{PROJECT['requires-python']}"
    assert needed == {python, *(name.replace(" ", "") for name in PROJECT["dependencies"])}
    assert PROJECT["description"] in RECIPE
    for command, entry in PROJECT["scripts"].items():
        assert f"- {command} = {entry}\n" in RECIPE


def test_the_author_is_that_of_the_citation():
    assert [author["name"] for author in PROJECT["authors"]] == re.findall(
        r'^  - name: "(.*)"$', CITATION, re.MULTILINE
    )


def test_typed():
    assert "Typing :: Typed" in PROJECT["classifiers"]
    for package in ("iada", "iada_kernels"):
        assert (ROOT / package / "py.typed").exists()
