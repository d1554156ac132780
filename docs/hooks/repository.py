"""The rest of the repository in the site: its own pages, and files that pages link to.

Pages are written for a reader of the repository, with links relative to the file they are in. Here
CONTRIBUTING, CHANGELOG and the README of bench become pages; a linked file of code becomes a page
that shows it, another file is copied, and a linked folder, which a site cannot show, is its name
alone. A link to what is not there is a warning, which `mkdocs build --strict` ends with.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "measurements.md",
}
CODE = {".py": "python", ".toml": "toml", ".cff": "yaml"}
LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
BLOCK = re.compile(r"^(?:```.*?^```|(?: {4}[^\n]*\n)+)", re.DOTALL | re.MULTILINE)

log = logging.getLogger("mkdocs.hooks.repository")


def on_files(files, config):
    """Adds the generated pages, and the files that pages link to."""
    for source, page in PAGES.items():
        if source != "README.md":
            files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        for target in linked(page.content_string, folder_of(page.src_uri)):
            place = ROOT / target
            if place.is_dir() or target.startswith("docs/") or target in PAGES:
                continue
            uri = site_place(target)
            if not place.exists() or files.get_file_from_path(uri) is not None:
                continue
            if place.suffix in CODE:
                files.append(File.generated(config, uri, content=shown(target)))
            else:
                files.append(File.generated(config, uri, abs_src_path=str(place)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Makes links between files of the repository links between pages."""
    uri = page.file.src_uri
    folder = folder_of(uri)

    def rewritten(match):
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        if ":" in target:
            return match[0]
        target = posixpath.normpath(posixpath.join(folder, target))
        if target.startswith("../") or not (ROOT / target).exists():
            if target.startswith("docs/") and files.get_file_from_path(target[5:]) is not None:
                return match[0]  # a generated page
            log.warning("%s links to %s, which is not there", uri, target)
            return match[0]
        if (ROOT / target).is_dir():
            return text[1:-1] if "`" in text else f"`{text[1:-1]}`"
        place = posixpath.relpath(site_place(target), posixpath.dirname(uri) or ".")
        return f"{text}({place}{anchor})"

    def outside_code(text):
        return LINK.sub(rewritten, text)

    parts, end = [], 0
    for block in BLOCK.finditer(markdown):
        parts += [outside_code(markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, outside_code(markdown[end:])])


def folder_of(uri):
    """Where in the repository links of this page count from."""
    for source, page in PAGES.items():
        if uri == page != "index.md":
            return posixpath.dirname(source)
    return posixpath.join("docs", posixpath.dirname(uri))


def site_place(target):
    """Where in the site a file of the repository is."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/notebooks/"):  # the page that its cells make
        return target[5:].removesuffix(".py") + ".md"
    if target.startswith("docs/"):
        return target[5:]
    return f"source/{target}.md" if Path(target).suffix in CODE else f"source/{target}"


def linked(markdown, folder):
    """The files of the repository that a text links to."""
    for match in LINK.finditer(BLOCK.sub("", markdown)):
        if ":" not in match["target"]:
            yield posixpath.normpath(posixpath.join(folder, match["target"]))


def shown(target):
    """A page with a file of code."""
    place = ROOT / target
    front = "---\nsearch:\n  exclude: true\nhide: [navigation, toc]\n---\n"
    return f"{front}# `{target}`\n\n````{CODE[place.suffix]}\n{place.read_text()}````\n"
