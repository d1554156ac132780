"""What the paper argues but does not measure: the surrogate's gap, the loss's terms, spectra."""

from iada.experiments.diagnostics.spectrum import effective_rank, spectrum
from iada.experiments.diagnostics.surrogate import SurrogateGap, surrogate_gap
from iada.experiments.diagnostics.terms import Terms, TermsLog, regularization_terms

__all__ = [
    "SurrogateGap",
    "Terms",
    "TermsLog",
    "effective_rank",
    "regularization_terms",
    "spectrum",
    "surrogate_gap",
]
