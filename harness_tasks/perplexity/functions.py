"""Functions that the YAML beside this file names; the code is in `memdec.tasks` and `memdec.rows`."""

from memdec.rows import RowsTask
from memdec.tasks import bits_of_sums, load_corpus, load_wikitext, perplexity_of_sums, rolling_results, total

__all__ = ["RowsTask", "bits_of_sums", "load_corpus", "load_wikitext", "perplexity_of_sums", "rolling_results", "total"]
