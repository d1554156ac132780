"""The experiments of the two papers, a recipe each, run and compared by `python -m iada paper`."""
