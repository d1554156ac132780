"""What every part of `iada` stands on: checks, process groups, seeds, files, loading, autocast."""
