"""One table, as plain text and as Markdown; page.html shows it as HTML."""

from collections.abc import Sequence
from typing import NamedTuple

UNKNOWN = "–"


class Cell(NamedTuple):
    """A cell: its text, None for what is not known; `small` is a second, smaller line in HTML."""

    text: str | None
    bold: bool = False
    small: str | None = None


class Table(NamedTuple):
    """Column names, and rows whose first cell names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def text(self) -> str:
        """Aligned columns for a terminal."""
        lines = [list(self.head), *([cell.text or UNKNOWN for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = []
        for first, *others in lines:
            numbers = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
            shown.append("  ".join([first.ljust(widths[0]), *numbers]).rstrip())
        return "\n".join(shown)

    def markdown(self) -> str:
        """A table of GitHub's Markdown."""
        lines = [_markdown_row(self.head), "|---|" + "---:|" * (len(self.head) - 1)]
        for row in self.rows:
            texts = [cell.text or UNKNOWN for cell in row]
            bold = [cell.bold for cell in row]
            shown = [f"**{t}**" if b else t for t, b in zip(texts, bold, strict=True)]
            lines.append(_markdown_row(shown))
        return "\n".join(lines)


def _markdown_row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in texts)} |"
