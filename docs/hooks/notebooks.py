"""The notebooks: Python files of cells (`# %%`), run for every build, shown with what they print.

No output is kept in the repository. What is built must name no folder of the machine that built it.
"""

import functools
import logging
import re
import tempfile
from pathlib import Path

import jupytext
import nbformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
SECONDS = 300  # a cell; far more than any takes

log = logging.getLogger("mkdocs.hooks.notebooks")


def on_files(files, config):
    """A page, its figures and the notebook itself for each file of cells."""
    for script in sorted((Path(config.docs_dir) / "notebooks").glob("*.py")):
        log.info("Running %s", script.name)
        markdown, figures, notebook = executed(script.read_text(encoding="utf-8"))
        place = f"notebooks/{script.stem}"
        check_no_folder(script.name, markdown + notebook)
        download = f"[This page as a notebook]({script.stem}.ipynb), run when the page was built.\n"
        title, rest = markdown.lstrip().split("\n", 1)
        files.append(File.generated(config, f"{place}.md", content=f"{title}\n\n{download}{rest}"))
        files.append(File.generated(config, f"{place}.ipynb", content=notebook))
        for name, content in figures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


@functools.cache  # `mkdocs serve` builds again and again
def executed(text):
    """Markdown, {file name: figure} and the notebook's JSON of a run in an empty folder."""
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(
            notebook,
            timeout=SECONDS,
            resources=resources,
            record_timing=False,
            extra_arguments=["--log-level=ERROR"],  # it would warn of its local port
        ).execute()
    slug = re.sub(r"\W+", "-", notebook.cells[0].source.splitlines()[0].strip("# ")).lower()
    markdown, resources = MarkdownExporter().from_notebook_node(
        notebook, {"unique_key": slug, "output_files_dir": "."}
    )
    figures = {Path(name).name: content for name, content in resources["outputs"].items()}
    markdown = re.sub(
        r"!\[[^\]]*\]\((?:\./)?([^)]+)\)", figure_with_alternative(notebook), markdown
    )
    return markdown, figures, nbformat.writes(notebook)


def figure_with_alternative(notebook):
    """Each figure is told in words by the `alt` of its cell."""
    texts = iter(cell.metadata.get("alt", "") for cell in notebook.cells if has_figure(cell))

    def written(match):
        words = next(texts)
        if not words:
            raise PluginError(f'{match[0]}: expected alt="…" beside its cell\'s # %%, got none')
        return f"![{words}]({Path(match[1]).name})"

    return written


def has_figure(cell):
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))


def check_no_folder(name, text):
    """Nothing that is published tells where it was built."""
    for folder in {str(ROOT), str(Path.home()), tempfile.gettempdir()}:
        if f"{folder}/" in text:
            raise PluginError(f"{name}: expected no path of this machine, got {folder}")
