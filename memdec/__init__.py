"""Memory Decoder Bench: train, evaluate and compare Memory Decoders (arXiv 2508.09874)."""

from pathlib import Path

__version__ = "0.1.0"

HARNESS_TASKS = Path(__file__).resolve().parent.parent / "harness_tasks"  # beside the package, installed or checked out
