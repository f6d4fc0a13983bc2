"""Everything that is compared, by name: each system is a causal LM made from folders, or says why it cannot be.

    system = SYSTEMS["knn-lm"]
    parts = Parts(base=Path("models/gpt2-L"), datastore=(Path("keys/datastore"),), index=Path("keys/index"))
    model = system.build(parts) if system.reason(parts) is None else None

Harness, evaluation and latency treat all of them alike: `forward` gives normalised log-probabilities, `generate` works.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from memdec.artefacts import artefact, resources
from memdec.errors import ArtifactError, ConfigError, MemDecError, ResourceError
from memdec.inference import icrag, knnlm
from memdec.inference.icrag import IcRagForCausalLM
from memdec.inference.knnlm import KnnLMForCausalLM
from memdec.inference.mixture import MemDecForCausalLM
from memdec.inference.wrapper import Wrapper
from memdec.models import loading
from memdec.settings import KnnLMSettings, RetrievalSettings
from memdec.text import tokens


@dataclass(frozen=True)
class Parts:
    """What systems around one base are made of; a system needs some of the folders.

    Attributes:
        base: Model folder.
        dapt: The base after DAPT.
        lora: LoRA adapter of the base.
        memory: Memory decoder.
        dapt_memory: Small model after DAPT, mixed in as a memory is.
        datastore: All shards of the base's own keys.
        index: Index over them.
        passages: Passages for In-Context RAG.
        alpha: Weight of `memory` or `dapt_memory` (default: best single value of the paper's Table 7).
        knn_lm: Numbers of the kNN-LM.
        retrieval: Numbers of In-Context RAG.
        dtype: Weights' type of all models.
        device: Where they go.
    """

    base: Path
    dapt: Path | None = None
    lora: Path | None = None
    memory: Path | None = None
    dapt_memory: Path | None = None
    datastore: tuple[Path, ...] = ()
    index: Path | None = None
    passages: Path | None = None
    alpha: float = 0.6
    knn_lm: KnnLMSettings = field(default_factory=KnnLMSettings)
    retrieval: RetrievalSettings = field(default_factory=RetrievalSettings)
    dtype: str = "float32"
    device: str = "cpu"


_MODELS = ("base", "dapt", "memory", "dapt_memory")  # parts with weights that count


@dataclass(frozen=True)
class System:
    """One thing that is compared.

    Attributes:
        name: As in commands and results.
        needs: Parts that it is made of.
        fits: Raises where its parts do not go together; loads no weights.
        make: Loads it.
    """

    name: str
    needs: tuple[str, ...]
    fits: Callable[[Parts], object]
    make: Callable[[Parts], Wrapper]

    def check(self, parts: Parts) -> None:
        """Everything that can be known to be wrong before weights are loaded.

        Raises:
            MemDecError: A part is missing, of another model or tokenizer, or too large for the memory.
        """
        missing = [name for name in self.needs if not getattr(parts, name)]
        if missing:
            raise ConfigError(
                f"expected the parts {', '.join(self.needs)}, found no {', '.join(missing)}; give its folder"
            )
        self.fits(parts)
        _check_memory(self.needs, parts)

    def reason(self, parts: Parts) -> str | None:
        """Why it cannot run here, or None where it can."""
        try:
            self.check(parts)
        except MemDecError as error:
            return f"{self.name}: {error}"
        return None

    def build(self, parts: Parts) -> Wrapper:
        """The system as a causal LM.

        Raises:
            MemDecError: It cannot run here.
        """
        self.check(parts)
        return self.make(parts)


# --- whether parts go together ------------------------------------------------------------------------------------


def _folder(parts: Parts, name: str) -> Path:
    path: Path = getattr(parts, name)  # `System.check` has seen that it is there
    return path


def _tokenizer(folder: Path) -> Any:
    """Tokenizer of a model that is there, and whole if it is an artefact."""
    loading.check_folder(folder)
    kind = artefact.kind_of(folder)
    if kind is not None:
        artefact.read(folder, kind)
    return tokens.load_tokenizer(str(folder))


def _fits_alone(parts: Parts) -> None:
    _tokenizer(parts.base)


def _fits_base(name: str) -> Callable[[Parts], None]:
    """A memory must have the base's token ids."""

    def fits(parts: Parts) -> None:
        folder = _folder(parts, name)
        tokens.check_same_ids(_tokenizer(parts.base), _tokenizer(folder), f"{parts.base} with {folder}")

    return fits


def _made_from_base(name: str, kind: str) -> Callable[[Parts], None]:
    """DAPT and LoRA must have started from this very base."""

    def fits(parts: Parts) -> None:
        folder, base = _folder(parts, name), artefact.read(parts.base, "model")
        if artefact.read(folder, kind).inputs.get("model") != base.recipe:
            raise ArtifactError(
                f"{folder}: expected what was trained from {parts.base}, found something from another model; check the paths"
            )

    return fits


def _fits_knn(parts: Parts) -> None:
    knnlm.check_folders(parts.base, parts.datastore, _folder(parts, "index"), parts.knn_lm)


def _fits_passages(parts: Parts) -> None:
    icrag.check_folders(parts.base, _folder(parts, "passages"), parts.retrieval)


def _check_memory(needs: tuple[str, ...], parts: Parts) -> None:
    """Weights must fit on their device, an index into memory.

    Raises:
        ResourceError: They do not.
    """
    n_weights = sum(loading.n_parameters(loading.on_meta(_folder(parts, name))) for name in needs if name in _MODELS)
    weights = n_weights * getattr(torch, parts.dtype).itemsize
    index = sum(artefact.read(_folder(parts, "index"), "index").files.values()) if "index" in needs else 0
    what, instead = f"weights in {parts.dtype}", "use another dtype or device"
    if torch.device(parts.device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(parts.device)
        if weights > free:
            sizes = f"expected {resources.size(weights)} free on {parts.device}, found {resources.size(free)}"
            raise ResourceError(f"{what}: {sizes}; {instead}")
        weights = 0
    resources.check_memory(weights + index, what, instead)


# --- loading ------------------------------------------------------------------------------------------------------


def _load(folder: Path, parts: Parts) -> Any:
    return loading.load(folder, dtype=parts.dtype).to(parts.device)


def _mixture(parts: Parts, base: Any, *memories: Path) -> MemDecForCausalLM:
    n_vocab = len(tokens.load_tokenizer(str(parts.base)))
    loaded = [_load(memory, parts) for memory in memories]
    return MemDecForCausalLM.from_models(base, loaded, [parts.alpha for _ in loaded], n_vocab=n_vocab)


def _lora(parts: Parts) -> MemDecForCausalLM:
    """The adapter added to the weights: no slower than the base."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(_load(parts.base, parts), str(parts.lora))
    return _mixture(parts, adapted.merge_and_unload())


def _mixed_with(name: str) -> Callable[[Parts], MemDecForCausalLM]:
    return lambda parts: _mixture(parts, _load(parts.base, parts), _folder(parts, name))


def _knn_lm(parts: Parts, **changes: float) -> KnnLMForCausalLM:
    settings = parts.knn_lm.model_copy(update=changes)
    return KnnLMForCausalLM.from_folders(
        parts.base, parts.datastore, _folder(parts, "index"), settings, dtype=parts.dtype, device=parts.device
    )


def _ic_rag(parts: Parts) -> IcRagForCausalLM:
    return IcRagForCausalLM.from_folders(
        parts.base, _folder(parts, "passages"), parts.retrieval, dtype=parts.dtype, device=parts.device
    )


_KEYS = ("base", "datastore", "index")
SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System("base", ("base",), _fits_alone, lambda parts: _mixture(parts, _load(parts.base, parts))),
        System(
            "dapt", ("dapt",), _made_from_base("dapt", "model"),
            lambda parts: _mixture(parts, _load(_folder(parts, "dapt"), parts)),
        ),
        System("lora", ("base", "lora"), _made_from_base("lora", "lora"), _lora),
        System("knn-lm", _KEYS, _fits_knn, _knn_lm),
        System("ic-rag", ("base", "passages"), _fits_passages, _ic_rag),
        System("memdec", ("base", "memory"), _fits_base("memory"), _mixed_with("memory")),
        System("dapt-interp", ("base", "dapt_memory"), _fits_base("dapt_memory"), _mixed_with("dapt_memory")),
        System("knn-distribution", _KEYS, _fits_knn, lambda parts: _knn_lm(parts, weight=1.0)),
    )
}  # fmt: skip
