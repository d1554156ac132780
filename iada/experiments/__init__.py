"""Everything that reproduces papers: data sets, scenarios, recipes, runs, reports."""
