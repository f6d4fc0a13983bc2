"""The class of our lm-eval tasks, which records the source of its rows and the task's metadata on alpha."""

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
    """The tokenizer of the evaluated model; a task's metadata contains `--model_args` and `--metadata`."""
    name = metadata.get("tokenizer") or metadata.get("pretrained") or PAPER_BASE
    return tokens.load_tokenizer(
        str(name),
        metadata.get("revision"),
        subfolder=metadata.get("subfolder") or "",
        trust_remote_code=bool(metadata.get("trust_remote_code")),
    )


@dataclass(frozen=True, slots=True)
class Declared:
    """A task's metadata on alpha; each of its requests has it as attribute `declared`.

    Attributes:
        paper_alpha: The paper's weight of the memory for the task.
        tune_split: The split on which alpha may be tuned.
        metadata: The task's metadata, which is needed to load it with another split.
    """

    paper_alpha: float | None = None
    tune_split: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def declared(request: Instance) -> Declared:
    """The metadata on alpha of a request's task; empty for tasks that are not ours."""
    found: Declared = getattr(request, "declared", Declared())
    return found


class RowsTask(ConfigurableTask):
    """lm-eval task whose `custom_dataset` returns `Rows` by split; the results' config states sources and counts.

    Metadata: `paper_alpha`, the paper's weight of the memory; `tune_split`, the split on which alpha may be tuned.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config={key: value for key, value in (config or {}).items() if key != "class"})

    def build_all_requests(self, **kwargs: Any) -> None:
        """Build or load the requests as lm-eval does, and attach the task's metadata on alpha to each."""
        super().build_all_requests(**kwargs)
        metadata = {key: value for key, value in self.config.metadata.items() if key != "rows"}
        says = Declared(metadata.get("paper_alpha"), metadata.get("tune_split"), metadata)
        for request in self.instances:
            request.declared = says

    def dump_config(self) -> dict[str, Any]:
        """The config as lm-eval writes it, with demonstrations inside the rows counted in `num_fewshot`."""
        config: dict[str, Any] = super().dump_config()
        return config | {"num_fewshot": self.config.metadata.get("shots", config.get("num_fewshot"))}

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        with one_line_errors():
            metadata = self.config.metadata
            rows: dict[str, Rows] = self.config.custom_dataset(**metadata)
        self.dataset = {split: each.rows for split, each in rows.items()}
        metadata["rows"] = {split: each.facts() for split, each in rows.items()}


class TaskSplit:
    """All requests of one split of a task, and the task's first metric for the answers.

    Args:
        name: Name of the task.
        metadata: Metadata of the task; its `split` chooses the split.
    """

    def __init__(self, name: str, metadata: Mapping[str, Any]) -> None:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=dict(metadata))
        self._task = manager.load([name])["tasks"][name]
        if self._task.get_config("num_fewshot") is None:
            self._task.set_config("num_fewshot", 0)
        self._task.set_fewshot_seed(seed=FEWSHOT_SEED)
        self._task.build_all_requests(rank=0, world_size=1)
        self.requests: list[Instance] = self._task.instances

    def value(self, answers: Sequence[Any]) -> tuple[str, float, bool]:
        """Name and value of the first metric, and whether higher is better; `answers` is in the order of `requests`."""
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
