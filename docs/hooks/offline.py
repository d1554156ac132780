"""Nothing that a page loads lies elsewhere: the diagrams' program is beside it; this is checked."""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.utils import get_relative_url

MERMAID = "assets/vendor/mermaid/mermaid.tiny.js"
DIAGRAM = re.compile(r'(<pre class="mermaid">.*?</pre>)', re.DOTALL)
LOADED = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
)


def on_page_content(html, page, config, files):
    """The theme fetches mermaid from a CDN unless it is there: on the pages that use it, it is."""
    if '<pre class="mermaid">' not in html:
        return html
    html = DIAGRAM.sub(r'<div class="diagram">\1</div>', html)  # which scrolls by itself
    return f'{html}\n<script src="{get_relative_url(MERMAID, page.url)}"></script>'


def on_post_build(config):
    """No page loads anything from another host."""
    for page in Path(config.site_dir).rglob("*.html"):
        found = LOADED.search(page.read_text(encoding="utf-8"))
        if found:
            raise PluginError(f"{page.name} loads {found[0]}")
