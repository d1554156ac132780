"""Every public name is in the reference: those that its page does not order itself are added."""

from pathlib import Path

PAGE = "reference.md"
MARKER = "<!-- other names of {module} -->"
MODULES = ("iada", "iada_kernels")


def public_names(module):
    """What a package exports, in order."""
    return [f"{module}.{name}" for name in __import__(module).__all__]


def completed(markdown):
    """The page with an entry for each name that has none yet, under its package's marker."""
    entries = {line.removeprefix("::: ").strip() for line in markdown.splitlines() if ":::" in line}
    for module in MODULES:
        missing = [name for name in public_names(module) if name not in entries]
        text = "\n\n".join(f"::: {name}" for name in missing)
        markdown = markdown.replace(MARKER.format(module=module), text)
    return markdown


def on_page_markdown(markdown, page, config, files):
    """Completes the reference."""
    return completed(markdown) if page.file.src_uri == PAGE else markdown


def on_post_build(config):
    """What was built has each name as a place that others can link to."""
    page = (Path(config.site_dir) / PAGE).with_suffix(".html").read_text(encoding="utf-8")
    names = [name for module in MODULES for name in public_names(module)]
    missing = [name for name in names if f'id="{name}"' not in page]
    if missing:
        raise SystemExit(f"the reference lacks {', '.join(missing)}")
