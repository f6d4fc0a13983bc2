"""Public import path of `MemDecForCausalLM`; importing it registers mixtures with `AutoModelForCausalLM`."""

from memdec.inference.mixture import MemDecForCausalLM
from memdec.inference.wrapper import MemDecConfig

__all__ = ["MemDecConfig", "MemDecForCausalLM"]
