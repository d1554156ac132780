"""Pages are Jinja2 templates beside this file."""

from importlib import resources
from typing import Any

import jinja2


def fill(template: str, **values: Any) -> str:
    """A template of this folder with these values, escaped where it does not say they are HTML."""
    text = resources.files("iada.experiments.report").joinpath(template).read_text("utf-8")
    options: Any = {"undefined": jinja2.StrictUndefined, "keep_trailing_newline": True}
    environment = jinja2.Environment(autoescape=True, **options)
    return environment.from_string(text).render(values)
