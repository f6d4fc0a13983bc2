"""Functions for the YAML files of this folder; their code is in `memdec.tasks.domain` and `memdec.tasks.rows`."""

from memdec.tasks.domain import (
    ChoiceTask,
    entity_results,
    headline_results,
    load_casehold,
    load_choices,
    load_entities,
    load_headlines,
    load_multi_gold,
    load_numbers,
    micro_macro_results,
    number_results,
    token_mean_results,
    weighted_f1_results,
)
from memdec.tasks.domain_metrics import headline_f1, macro_f1, micro_f1, micro_macro_mean, weighted_f1
from memdec.tasks.task import RowsTask

__all__ = [
    "ChoiceTask",
    "RowsTask",
    "entity_results",
    "headline_f1",
    "headline_results",
    "load_casehold",
    "load_choices",
    "load_entities",
    "load_headlines",
    "load_multi_gold",
    "load_numbers",
    "macro_f1",
    "micro_f1",
    "micro_macro_mean",
    "micro_macro_results",
    "number_results",
    "token_mean_results",
    "weighted_f1",
    "weighted_f1_results",
]
