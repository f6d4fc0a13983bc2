"""The class of our lm-eval tasks, which states where its rows come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from memdec import HARNESS_TASKS
from memdec.errors import one_line_errors
from memdec.settings import PAPER_BASE
from memdec.tasks.rows import Rows
from memdec.text import tokens

FEWSHOT_SEED = 1234  # lm-eval's default


def tokenizer(metadata: Mapping[str, Any]) -> Any:
    """The tokenizer of the model that is evaluated: tasks see `--model_args` and `--metadata`."""
    name = metadata.get("tokenizer") or metadata.get("pretrained") or PAPER_BASE
    return tokens.load_tokenizer(str(name), metadata.get("revision"))


@dataclass(frozen=True, slots=True)
class Declared:
    """What a task says of alpha; every request of ours carries it as `declared`.

    Attributes:
        paper_alpha: The paper's weight of the memory for the task.
        tune_split: The split that alpha may be tuned on.
        metadata: Of the task, to load it again.
    """

    paper_alpha: float | None = None
    tune_split: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def declared(request: Instance) -> Declared:
    """What the task of a request says of alpha; nothing for tasks that are not ours."""
    found: Declared = getattr(request, "declared", Declared())
    return found


class RowsTask(ConfigurableTask):
    """Task of lm-eval whose `custom_dataset` gives `Rows` by split; sources and counts stand in the results' config.

    Metadata: `paper_alpha`, the paper's weight of the memory; `tune_split`, what alpha may be tuned on.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config={key: value for key, value in (config or {}).items() if key != "class"})

    def build_all_requests(self, **kwargs: Any) -> None:
        """As lm-eval does, from its cache too; each request then says what the task declares of alpha."""
        super().build_all_requests(**kwargs)
        metadata = {key: value for key, value in self.config.metadata.items() if key != "rows"}
        says = Declared(metadata.get("paper_alpha"), metadata.get("tune_split"), metadata)
        for request in self.instances:
            request.declared = says

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


class TaskSplit:
    """All requests of one split of a task, and the task's first metric for answers to them.

    Args:
        name: Of the task.
        metadata: Of the task; `split` says which.
    """

    def __init__(self, name: str, metadata: Mapping[str, Any]) -> None:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(HARNESS_TASKS), metadata=dict(metadata))
        self._task = manager.load([name])["tasks"][name]
        if self._task.get_config("num_fewshot") is None:
            self._task.set_config("num_fewshot", 0)
        self._task.set_fewshot_seed(seed=FEWSHOT_SEED)
        self._task.build_all_requests(rank=0, world_size=1)
        self.requests: list[Instance] = self._task.instances

    def value(self, answers: Sequence[Any]) -> tuple[str, float, bool]:
        """Name and value of the first metric, and whether a higher one is better; `answers` in the order of `requests`."""
        by_row: dict[Any, list[Instance]] = {}
        for request, answer in zip(self.requests, answers, strict=True):
            request.resps, request.filtered_resps = [answer], {}
            by_row.setdefault(request.doc_id, []).append(request)
        self._task.apply_filters()
        first = next(iter(self.requests[0].filtered_resps))
        items: dict[str, list[Any]] = {}
        for asked in by_row.values():
            asked.sort(key=lambda request: request.idx)
            found = self._task.process_results(asked[0].doc, [request.filtered_resps[first] for request in asked])
            for metric, item in found.items():
                items.setdefault(metric, []).append(item)
        metric = next(iter(items))
        value = float(self._task.aggregation()[metric](items[metric]))
        return metric, value, bool(self._task.higher_is_better().get(metric, True))
