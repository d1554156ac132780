"""Random cases of every pass of every backend, judged against torch's own error.

`python -m tests.fuzz --cases 10000 --backend native` runs them; `--seed S --case K` repeats one.
"""
