"""The version, here alone: the build reads this line, in a checkout as in an installed package."""

__version__ = "0.1.0"
