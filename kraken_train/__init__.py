"""Pretraining of Transformers whose parallelism is part of the architecture (Kraken, arXiv 2408.07802)."""

__version__ = "0.1.0"
