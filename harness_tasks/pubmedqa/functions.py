"""Functions that the YAML beside this file names; the code is in `memdec.adaptllm` and `memdec.rows`."""

from memdec.adaptllm import load_choices, token_mean_results
from memdec.rows import RowsTask

__all__ = ["RowsTask", "load_choices", "token_mean_results"]
