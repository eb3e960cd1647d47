"""ctp: compress a language model, then win the lost accuracy back with a learned prompt."""

__version__ = "0.1.0"
