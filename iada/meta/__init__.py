"""One bilevel step, exact and without a graph of second order: Meta-IADA and its parts."""
