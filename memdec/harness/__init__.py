"""The systems as lm-eval models: `memdec-interp` and its baselines, with a store of per-token scores.

May import: everything up to inference.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memdec.harness.models import MemDecInterp

__all__ = ["MemDecInterp"]


def __getattr__(name: str) -> Any:
    """Import the lm-eval model when it is asked for: stored scores are read without lm-eval and torch."""
    if name == "MemDecInterp":
        from memdec.harness.models import MemDecInterp

        return MemDecInterp
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
