"""Functions that the YAML beside this file names; the code is in `memdec.closed_book` and `memdec.rows`."""

from memdec.closed_book import load_hotpotqa, load_nq, prompt, qa_results
from memdec.rows import RowsTask

__all__ = ["RowsTask", "load_hotpotqa", "load_nq", "prompt", "qa_results"]
