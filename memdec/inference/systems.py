"""The registry of compared systems: for each name, the parts it needs, how they are checked and how it is loaded.

    system = SYSTEMS["kNN-LM"]
    parts = Parts(base="models/gpt2-L", datastore=(Path("keys/datastore"),), index=Path("keys/index"))
    model = system.build(parts) if system.reason(parts) is None else None

Config, rules, evaluation, harness and latency all use these names and checks. A built system is a causal LM: `forward`
gives normalised log-probabilities, and `generate` works. Importing this module imports no model code; each system
imports its own code when it is checked or built.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from memdec.artefacts import artefact
from memdec.errors import ArtifactError, ConfigError, MemDecError
from memdec.settings import DEFAULT_ALPHA, KnnLMSettings, RetrievalSettings, SystemName


@dataclass(frozen=True)
class Parts:
    """Folders and settings of the systems around one base; each system needs some of them.

    Attributes:
        base: Base model: folder or Hub id.
        dapt: The base after DAPT.
        lora: LoRA adapter of the base.
        memory: Memory decoder, or a small model after DAPT in its place: folder or Hub id.
        datastore: All shards of the datastore made with the base.
        index: Index over the datastore.
        passages: Passages for In-Context RAG.
        alpha: Weight of `memory`.
        knn_lm: Settings of the kNN-LM; `weight` is lambda.
        retrieval: Settings of In-Context RAG.
        dtype: Number type of the weights; `auto` is the one that they were saved in.
        memory_dtype: Number type of the memory's weights; None: as the base.
        device: Device of all models.
        spread: Whether the base is spread over all GPUs, of which `device` is the first.
        revision: Commit of the base, for Hub ids.
        memory_revision: Commit of the memory.
        subfolder: Subfolder of the base's repository on the Hub.
        trust_remote_code: Whether the user allows base and memory to run code from their repositories.
        tokenizer: Tokenizer of the base, loaded; None: the one in its folder.
    """

    base: str | Path
    dapt: Path | None = None
    lora: Path | None = None
    memory: str | Path | None = None
    datastore: tuple[Path, ...] = ()
    index: Path | None = None
    passages: Path | None = None
    alpha: float = DEFAULT_ALPHA
    knn_lm: KnnLMSettings = field(default_factory=KnnLMSettings)
    retrieval: RetrievalSettings = field(default_factory=RetrievalSettings)
    dtype: str = "float32"
    memory_dtype: str | None = None
    device: str = "cpu"
    spread: bool = False
    revision: str | None = None
    memory_revision: str | None = None
    subfolder: str = ""
    trust_remote_code: bool = False
    tokenizer: Any | None = None

    def of(self, name: str) -> Any:
        """A part by its name; `System.check_parts` has made sure that it is given."""
        return getattr(self, name)


@dataclass(frozen=True)
class System:
    """One compared system.

    Attributes:
        name: Its name in config, records and tables.
        needs: Names of the fields of `Parts` that it is made from.
        weight: Name of the mixing weight of its second distribution; None: it has one distribution.
        fits: Raises if the parts do not match; loads no weights.
        load: Loads the causal LM that the system wraps.
        wrap: (that causal LM, parts, rows that the tokenizer needs in a head) -> the system.
    """

    name: SystemName
    needs: tuple[str, ...]
    weight: Literal["alpha", "lambda"] | None
    fits: Callable[[Parts], object]
    load: Callable[[Parts], Any]
    wrap: Callable[[Any, Parts, int], Any]

    @property
    def slug(self) -> str:
        """Its name in paths."""
        return self.name.lower().replace(" ", "-")

    @property
    def seeded(self) -> bool:
        """Whether it has a trained part, which differs by seed; other systems are the same at every seed."""
        return any(name in _TRAINED for name in self.needs)

    def given(self, parts: Parts) -> bool:
        """Whether all parts that it needs are given."""
        return all(getattr(parts, name) for name in self.needs)

    def check_parts(self, parts: Parts) -> None:
        """Check that all needed parts are given and match.

        Raises:
            MemDecError: A part is missing, incomplete, or of another model or tokenizer.
        """
        missing = [name for name in self.needs if not getattr(parts, name)]
        if missing:
            raise ConfigError(
                f"expected the parts {', '.join(self.needs)}, found no {', '.join(missing)}; give its folder"
            )
        self.fits(parts)

    def check_room(self, parts: Parts) -> None:
        """Check, before anything is loaded, that weights fit on the device and the index fits into memory.

        Raises:
            ResourceError: They do not fit.
        """
        from memdec.artefacts import devices
        from memdec.models import loading

        weights = sum(
            loading.n_bytes(parts.of(name), _dtype(parts, name), **_where(parts, name))
            for name in self.needs
            if name in _MODELS
        )
        index = artefact.read(parts.of("index"), "index").n_bytes if "index" in self.needs else 0
        what, instead = f"weights in {parts.dtype}", "use another dtype or device"
        if devices.is_cuda(parts.device):
            devices.check_room(index, "cpu", "the index", "use a smaller one (kind ivfpq)")
            devices.check_room(weights, parts.device, what, instead, spread=parts.spread)
        else:
            devices.check_room(weights + index, parts.device, what, instead)

    def reason(self, parts: Parts) -> str | None:
        """Why the system cannot run with these parts on this machine; None if it can."""
        try:
            self.check_parts(parts)
            self.check_room(parts)
        except MemDecError as error:
            return f"{self.name}: {error}"
        return None

    def build(self, parts: Parts) -> Any:
        """Check the parts and load the system, a causal LM (`inference.wrapper.Wrapper`).

        Raises:
            MemDecError: The system cannot run with these parts on this machine.
        """
        from memdec.text import tokens

        self.check_parts(parts)
        self.check_room(parts)
        return self.wrap(self.load(parts), parts, tokens.n_needed(_tokenizer(parts, "base")))

    def second(self, parts: Parts) -> dict[str, str]:
        """What its second distribution depends on, except the weight: content of the added parts, and settings."""
        from memdec.models.loading import model_identity

        found: dict[str, str] = {
            name: artefact.read(parts.of(name), name).recipe for name in ("index", "passages") if name in self.needs
        }
        if "memory" in self.needs:
            found["memory"] = model_identity(str(parts.memory), parts.memory_revision)
            found["memory_dtype"] = str(parts.memory_dtype)
        return found | {key: str(value) for key, value in self.numbers(parts).items()}

    def numbers(self, parts: Parts) -> dict[str, Any]:
        """Settings of the system, without the weight."""
        if "index" in self.needs:
            return parts.knn_lm.model_dump(exclude={"weight"})
        return parts.retrieval.model_dump() if "passages" in self.needs else {}


_TRAINED = ("dapt", "lora", "memory")  # parts that are trained on the domain, from a seed
_MODELS = ("base", "dapt", "memory")  # parts whose weights are counted; a LoRA adapter is small


def _where(parts: Parts, name: str) -> dict[str, Any]:
    """Arguments that every reader of a part's files gets, besides its folder or Hub id."""
    revision = {"base": parts.revision, "memory": parts.memory_revision}.get(name)
    subfolder = parts.subfolder if name == "base" else ""
    return {"revision": revision, "subfolder": subfolder, "trust_remote_code": parts.trust_remote_code}


def _dtype(parts: Parts, name: str) -> str:
    return (parts.memory_dtype or parts.dtype) if name == "memory" else parts.dtype


# --- checks of the parts ------------------------------------------------------------------------------------------


def _tokenizer(parts: Parts, name: str) -> Any:
    """Load the tokenizer of a part, after checking that the model exists and, if it is an artefact, is complete."""
    from memdec.models import loading
    from memdec.text import tokens

    if name == "base" and parts.tokenizer is not None:
        return parts.tokenizer
    where = _where(parts, name)
    model = str(parts.of(name))
    loading.check_folder(model, where["subfolder"], any_weights=name == "base")
    return tokens.load_tokenizer(model, **where)


def _fits_alone(parts: Parts) -> None:
    _tokenizer(parts, "base")


def _fits_base(parts: Parts) -> None:
    """Check that the memory has the same token ids as the base."""
    from memdec.text import tokens

    tokens.check_same_ids(_tokenizer(parts, "base"), _tokenizer(parts, "memory"), f"{parts.base} with {parts.memory}")


def _made_from_base(name: str, kind: str) -> Callable[[Parts], None]:
    """Make a check that a DAPT model or LoRA adapter was trained from this base."""

    def fits(parts: Parts) -> None:
        from memdec.models import loading

        folder, base = parts.of(name), loading.known(parts.base, "model")
        if folder.is_dir() and not loading.is_artefact(folder):
            return  # a plain folder does not say what it was trained from
        if artefact.read(folder, kind).inputs.get("model") != base.recipe:
            raise ArtifactError(
                f"{folder}: expected what was trained from {parts.base}, found something from another model; check the paths"
            )

    return fits


def _fits_keys(parts: Parts) -> None:
    from memdec.inference import knnlm

    knnlm.check_folders(parts.base, _tokenizer(parts, "base"), parts.datastore, parts.of("index"), parts.knn_lm)


def _fits_passages(parts: Parts) -> None:
    from memdec.inference import icrag
    from memdec.models import loading

    config = loading.config(parts.base, **_where(parts, "base"))
    icrag.check_folders(parts.base, _tokenizer(parts, "base"), config, parts.of("passages"), parts.retrieval)


# --- loading ------------------------------------------------------------------------------------------------------


def _load(name: str) -> Callable[[Parts], Any]:
    """Make a loader of one part onto its device."""

    def load(parts: Parts) -> Any:
        from memdec.models import loading

        if parts.spread:
            return loading.load(parts.of(name), dtype=_dtype(parts, name), device_map="auto", **_where(parts, name))
        model = loading.load(parts.of(name), dtype=_dtype(parts, name), **_where(parts, name))
        return model.to(parts.device)

    return load


def _load_adapted(parts: Parts) -> Any:
    """Load the base and merge the adapter into its weights, so it is as fast as the base."""
    from memdec.models import loading

    return loading.adapted(_load("base")(parts), parts.of("lora")).merge_and_unload()


def _alone(base: Any, parts: Parts, n_vocab: int) -> Any:
    from memdec.inference.mixture import MemDecForCausalLM

    return MemDecForCausalLM.from_models(base, [], [], n_vocab=n_vocab)


def _mixed(base: Any, parts: Parts, n_vocab: int) -> Any:
    from memdec.inference.mixture import MemDecForCausalLM
    from memdec.models import loading

    dtype = parts.memory_dtype or str(base.dtype).removeprefix("torch.")
    memory = loading.load(parts.of("memory"), dtype=dtype, **_where(parts, "memory"))
    memory = loading.placed(memory, base.device, str(parts.memory))
    return MemDecForCausalLM.from_models(base, [memory], [parts.alpha], n_vocab=n_vocab)


def _with_neighbours(base: Any, parts: Parts, n_vocab: int) -> Any:
    from memdec.datastore import search
    from memdec.datastore.keys import Datastore
    from memdec.inference.knnlm import KnnLMForCausalLM

    store, numbers = Datastore(parts.datastore, base.device), parts.knn_lm.model_dump(exclude={"nprobe"})
    searcher = search.load(store, parts.of("index"), parts.knn_lm.nprobe, base.device)
    return KnnLMForCausalLM(base, store, searcher, **numbers, n_vocab=n_vocab)


def _with_passages(base: Any, parts: Parts, n_vocab: int) -> Any:
    from memdec.datastore.passages import Passages
    from memdec.inference.icrag import IcRagForCausalLM

    return IcRagForCausalLM(base, Passages(parts.of("passages")), **parts.retrieval.model_dump(), n_vocab=n_vocab)


_BASE = _load("base")
SYSTEMS: dict[SystemName, System] = {
    system.name: system
    for system in (
        System("base", ("base",), None, _fits_alone, _BASE, _alone),
        System("In-Context RAG", ("base", "passages"), None, _fits_passages, _BASE, _with_passages),
        System("kNN-LM", ("base", "datastore", "index"), "lambda", _fits_keys, _BASE, _with_neighbours),
        System("DAPT", ("dapt",), None, _made_from_base("dapt", "model"), _load("dapt"), _alone),
        System("LoRA", ("base", "lora"), None, _made_from_base("lora", "lora"), _load_adapted, _alone),
        System("MemDec", ("base", "memory"), "alpha", _fits_base, _BASE, _mixed),
    )
}
