"""What `python -m bench.gpu` and the other commands on a GPU are made of."""
