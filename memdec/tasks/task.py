"""The class of our lm-eval tasks, which records the source of its rows and the task's metadata on alpha."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from memdec import HARNESS_TASKS
from memdec.artefacts import artefact
from memdec.errors import ConfigError, one_line_errors
from memdec.settings import PAPER_BASE
from memdec.tasks.rows import Rows
from memdec.text import tokens

log = logging.getLogger("lm_eval.tasks.memdec")  # the lm_eval executable shows the messages of loggers under lm_eval

FEWSHOT_SEED = 1234  # lm-eval's default
# Arguments of `build_all_requests` that make the prompts of a run.
_PROMPTING = ("system_instruction", "apply_chat_template", "fewshot_as_multiturn", "chat_template", "tokenizer_name")
# What a user may set: type of each value.
_METADATA: dict[str, type | tuple[type, ...]] = {
    "corpus": str,
    "split": str,
    "tokenizer": str,
    "max_context": int,
}
_NEAR = frozenset({"tokenizers"})  # names of other models' arguments that look like one of these


def tokenizer(metadata: Mapping[str, Any]) -> Any:
    """The tokenizer of the evaluated model; a task's metadata contains `--model_args` and `--metadata`.

    Raises:
        ConfigError: They name no model. The model itself is unknown here: it may be an object.
    """
    name = str(metadata.get("tokenizer") or metadata.get("pretrained") or "")
    if not name:
        raise ConfigError(
            "tokenizer: expected pretrained or tokenizer in --model_args or metadata, found neither; give metadata="
            f"{{'pretrained': BASE}} with the base of the evaluated model (memdec-interp without arguments: {PAPER_BASE})"
        )
    inside = metadata.get("subfolder") or ""
    own = metadata.get("tokenizer") and Path(name).is_dir() and not Path(name, inside).is_dir()
    return tokens.load_tokenizer(
        name,
        metadata.get("revision"),
        subfolder="" if own else inside,
        trust_remote_code=bool(metadata.get("trust_remote_code")),
    )


def identity(words: Any) -> str:
    """Hash of what tasks take from a tokenizer: the ids of texts, and the EOS that joins documents."""
    return artefact.digest([tokens.fingerprint(words), words.eos_token])


def check_metadata(task: str, metadata: Mapping[str, Any]) -> None:
    """Check what a user may set with `--metadata`.

    Metadata also contains `--model_args`, of any model of lm-eval. So an unknown name is only an error if it is nearly a
    name that is read here.

    Raises:
        ConfigError: A value has another type, or a name is mistyped.
    """
    for key, kinds in _METADATA.items():
        value = metadata.get(key)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or value in ("", 0)):
            wanted = "a whole number from 1 on" if kinds is int else "text"
            raise ConfigError(f"{task}: expected {key} to be {wanted}, found {value!r}; correct --metadata")
    if isinstance(metadata.get("max_context"), int) and metadata["max_context"] < 1:
        raise ConfigError(
            f"{task}: expected max_context to be a whole number from 1 on, found {metadata['max_context']}; correct --metadata"
        )
    for key in metadata:
        near = difflib.get_close_matches(str(key), _METADATA, 1, cutoff=0.8)
        if near and key != near[0] and key not in _NEAR:
            raise ConfigError(f"{task}: expected {near[0]} in --metadata, found {key}; did you mean {near[0]}?")


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Check that tasks exist.

    Raises:
        ConfigError: There is no task, group or tag of a name; the message suggests the nearest ones.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
            raise ConfigError(f"task: expected the name of a task, found {name!r}; {hint}")


@dataclass(frozen=True, slots=True)
class Declared:
    """A task's metadata on alpha; each of its requests has it as attribute `declared`.

    Attributes:
        paper_alpha: The paper's weight of the memory for the task.
        tune_split: The split on which alpha may be tuned.
        metadata: The task's metadata, which is needed to load it with another split.
        prompting: How the run makes prompts: chat template and system prompt, as `build_all_requests` takes them.
        tokenizer: `identity` of the tokenizer that the task used, None if it used none.
    """

    paper_alpha: float | None = None
    tune_split: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    prompting: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None


def declared(request: Instance) -> Declared:
    """The metadata on alpha of a request's task; empty for tasks that are not ours."""
    found: Declared = getattr(request, "declared", Declared())
    return found


class RowsTask(ConfigurableTask):
    """lm-eval task whose `custom_dataset` returns `Rows` by split; the results' config states sources and counts.

    Metadata: `paper_alpha`, the paper's weight of the memory; `tune_split`, the split on which alpha may be tuned.
    """

    _tokenizer: str | None = None  # identity of the one that was used

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        plain = {key: value for key, value in (config or {}).items() if key != "class"}
        # The rows are those of the one split that is scored, so none of them may be a demonstration. At 0 lm-eval
        # ignores --num_fewshot and says so.
        super().__init__(config={"num_fewshot": 0, **plain})

    def build_all_requests(self, **kwargs: Any) -> None:
        """Build the requests, and attach the task's metadata on alpha to each.

        lm-eval's cache of requests is not used: its key is the name of the task, which does not say from which corpus,
        rows, split or tokenizer the requests were made.
        """
        if kwargs.get("cache_requests"):
            log.warning("%s: --cache_requests is ignored, requests are made anew from the rows", self.config.task)
            kwargs["cache_requests"] = False
        with one_line_errors():
            self._check_processes(**kwargs)
        super().build_all_requests(**kwargs)
        metadata = {key: value for key, value in self.config.metadata.items() if key != "rows"}
        prompting = {key: value for key, value in kwargs.items() if key in _PROMPTING}
        says = Declared(metadata.get("paper_alpha"), metadata.get("tune_split"), metadata, prompting, self._tokenizer)
        for request in self.instances:
            request.declared = says

    def _check_processes(
        self, *, limit: int | None = None, samples: Sequence[int] | None = None, world_size: int = 1, **_: Any
    ) -> None:
        """Check that every process has a row; one without would end while the others wait for it."""
        n = min(len(self.eval_docs), limit or len(self.eval_docs)) if samples is None else len(samples)
        if world_size > n:
            raise ConfigError(
                f"{self.config.task}: expected at most {n} processes, one for each row that is read, found {world_size}; start "
                "fewer of them"
            )

    def predictions(self, samples: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]] | None:
        """All labels of a classification task, and the predicted label of each row; None for other tasks.

        Args:
            samples: Rows as lm-eval logs them, with `doc`, `filtered_resps` and the metrics of each.
        """
        return None

    def dump_config(self) -> dict[str, Any]:
        """The config as lm-eval writes it, with demonstrations inside the rows counted in `num_fewshot`."""
        config: dict[str, Any] = super().dump_config()
        return config | {"num_fewshot": self.config.metadata.get("shots", config.get("num_fewshot"))}

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        with one_line_errors():
            metadata = self.config.metadata
            check_metadata(self.config.task, metadata)
            rows: dict[str, Rows] = self.config.custom_dataset(**metadata)
        self.dataset = {split: each.rows for split, each in rows.items()}
        self._tokenizer = next((each.tokenizer for each in rows.values() if each.tokenizer), None)
        metadata["rows"] = {split: each.facts() for split, each in rows.items()}


class TaskSplit:
    """All requests of one split of a task, and the task's first metric for the answers.

    Args:
        name: Name of the task.
        metadata: Metadata of the task; its `split` chooses the split.
        prompting: That of the run, as `Declared` has it.
    """

    def __init__(self, name: str, metadata: Mapping[str, Any], prompting: Mapping[str, Any] | None = None) -> None:
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=dict(metadata))
        self._task = manager.load([name])["tasks"][name]
        if self._task.get_config("num_fewshot") is None:
            self._task.set_config("num_fewshot", 0)
        self._task.set_fewshot_seed(seed=FEWSHOT_SEED)
        self._task.build_all_requests(rank=0, world_size=1, **(prompting or {}))
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
