"""The version of this package, as the chains name it."""

__version__ = "0.1.0"
