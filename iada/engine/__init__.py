"""Meta-IADA's iteration: exact hypergradients without a second-order graph (docs/training.md)."""
