"""The class of our lm-eval tasks, which states where its rows come from."""

from collections.abc import Mapping
from typing import Any

from lm_eval.api.task import ConfigurableTask

from memdec.errors import one_line_errors
from memdec.tasks.rows import Rows
from memdec.text import tokens


def tokenizer(metadata: Mapping[str, Any]) -> Any:
    """The tokenizer of the model that is evaluated: tasks see `--model_args` and `--metadata`."""
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not name:
        from memdec.settings import PAPER_BASE

        name = PAPER_BASE
    return tokens.load_tokenizer(str(name), metadata.get("revision"))


# Metadata of every task that was built, by name: a model sees of a request only the name of its task.
DECLARED: dict[str, dict[str, Any]] = {}


class RowsTask(ConfigurableTask):
    """Task of lm-eval whose `custom_dataset` gives `Rows` by split; sources and counts stand in the results' config.

    Metadata: `paper_alpha`, the paper's weight of the memory; `tune_split`, what alpha may be tuned on.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config={key: value for key, value in (config or {}).items() if key != "class"})
        DECLARED[self.config.task] = self.config.metadata

    def dump_config(self) -> dict[str, Any]:
        """As lm-eval's; demonstrations that stand in the rows count as shots."""
        config: dict[str, Any] = super().dump_config()
        return config | {"num_fewshot": self.config.metadata.get("shots", config.get("num_fewshot"))}

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        with one_line_errors():
            metadata = self.config.metadata
            rows: dict[str, Rows] = self.config.custom_dataset(**metadata)
        self.dataset = {split: each.rows for split, each in rows.items()}
        metadata["rows"] = {split: each.facts() for split, each in rows.items()}
