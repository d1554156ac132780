"""Figures and a page of finished runs. matplotlib is imported when something is drawn."""

from iada.experiments.report.page import write_page

__all__ = ["write_page"]
