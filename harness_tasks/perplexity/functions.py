"""Functions for the YAML files of this folder; their code is in `memdec.tasks.perplexity` and `memdec.tasks.rows`."""

from memdec.tasks.perplexity import (
    bits_of_sums,
    load_corpus,
    load_wikitext,
    n_windows,
    perplexity_of_sums,
    rolling_results,
    total,
)
from memdec.tasks.task import RowsTask

__all__ = [
    "RowsTask",
    "bits_of_sums",
    "load_corpus",
    "load_wikitext",
    "n_windows",
    "perplexity_of_sums",
    "rolling_results",
    "total",
]
