"""`python -m iada demo`: real digits, long-tailed and mislabelled, and a report to read."""
