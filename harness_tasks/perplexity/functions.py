"""Functions that the YAML beside this file names; the code is in `memdec.tasks`."""

from memdec.tasks import bits_of_sums, load_corpus, load_wikitext, perplexity_of_sums, rolling_results, total

__all__ = ["bits_of_sums", "load_corpus", "load_wikitext", "perplexity_of_sums", "rolling_results", "total"]
