"""The public place of `MemDecForCausalLM`: importing it also makes `AutoModelForCausalLM` know mixtures."""

from memdec.inference.mixture import MemDecForCausalLM
from memdec.inference.wrapper import MemDecConfig

__all__ = ["MemDecConfig", "MemDecForCausalLM"]
