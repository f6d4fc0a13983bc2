"""Memory Decoder Bench: train, evaluate and compare Memory Decoders (arXiv 2508.09874)."""

__version__ = "0.1.0"
