"""The reference has every public name, and nothing else."""

import importlib.util
from pathlib import Path

import pytest

import iada
import iada_kernels

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "reference.md").read_text()


@pytest.fixture
def reference():
    spec = importlib.util.spec_from_file_location("reference", DOCS / "hooks" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries(markdown):
    return [line.removeprefix("::: ") for line in markdown.splitlines() if line.startswith(":::")]


def test_each_public_name_has_one_entry(reference):
    public = [
        f"{module.__name__}.{name}" for module in (iada, iada_kernels) for name in module.__all__
    ]
    told = entries(reference.completed(PAGE))
    assert len(set(told)) == len(told)
    elsewhere = {"iada.sklearn.IADAClassifier", "iada.models.split_classifier"}
    assert set(told) == {*public, *elsewhere}


def test_a_new_name_is_picked_up(reference, monkeypatch):
    monkeypatch.setattr(iada, "__all__", [*iada.__all__, "novelty"])
    assert "iada.novelty" not in entries(PAGE)
    assert "iada.novelty" in entries(reference.completed(PAGE))


def test_a_page_that_lacks_a_name_is_no_build(reference, tmp_path):
    names = [name for module in reference.MODULES for name in reference.public_names(module)]
    page = tmp_path / "reference.html"
    config = type("Config", (), {"site_dir": str(tmp_path)})
    page.write_text("".join(f'<h3 id="{name}">' for name in names))
    reference.on_post_build(config)
    page.write_text("".join(f'<h3 id="{name}">' for name in names[1:]))
    with pytest.raises(SystemExit, match=names[0]):
        reference.on_post_build(config)
