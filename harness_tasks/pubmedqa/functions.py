"""Functions that the YAML beside this file names; the code is in `memdec.tasks`."""

from memdec.tasks import load_adaptllm, token_mean_results

__all__ = ["load_adaptllm", "token_mean_results"]
