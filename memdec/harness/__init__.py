"""The systems as lm-eval models: `memdec-interp` and its baselines, with a store of per-token scores.

May import: everything up to inference.
"""

from memdec.harness.models import MemDecInterp

__all__ = ["MemDecInterp"]
