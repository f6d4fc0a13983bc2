"""Functions for the YAML files of this folder; their code is in `memdec.tasks.qa` and `memdec.tasks.rows`."""

from memdec.tasks.qa import load_hotpotqa, load_nq, prompt, qa_results
from memdec.tasks.task import RowsTask

__all__ = ["RowsTask", "load_hotpotqa", "load_nq", "prompt", "qa_results"]
