"""The baselines as models of lm-eval: `memdec-knnlm` and `memdec-icrag`.

What they share with `memdec-interp` is in `memdec.harness.base_lm`. Here is what each of them mixes or reads.
"""

from pathlib import Path
from typing import Any

from memdec.artefacts import artefact
from memdec.datastore.search import load as load_index
from memdec.errors import ConfigError
from memdec.harness.base_lm import WrappedLM
from memdec.inference.icrag import IcRagForCausalLM
from memdec.inference.icrag import check_folders as check_passages
from memdec.inference.knnlm import KnnLMForCausalLM, check_folders
from memdec.inference.wrapper import Wrapper
from memdec.settings import KnnLMSettings, RetrievalSettings, parse


class MemDecKnnLM(WrappedLM):
    """The kNN-LM: the base with the neighbours of its own keys.

        lm_eval --model memdec-knnlm --model_args pretrained=BASE,datastore=STORE,index=INDEX,temperature=13 --tasks ...

    Args:
        pretrained: Base model that made the keys.
        datastore: Datastore folder; shards are joined by `+`.
        index: Index folder over it.
        weight: lambda, of p_kNN (paper: 0.25).
        temperature: tau, divides the squared distance (paper: 1 for GPT-2 small and medium, 13 for large and xl).
        neighbours: k.
        nprobe: Cells of an ivf index that are searched.
        kwargs: As for `WrappedLM`.
    """

    def __init__(
        self,
        pretrained: str,
        datastore: str,
        index: str,
        weight: float = 0.25,
        temperature: float = 1.0,
        neighbours: int = 1024,
        nprobe: int = 32,
        **kwargs: Any,
    ) -> None:
        numbers = {"weight": weight, "temperature": temperature, "neighbours": neighbours, "nprobe": nprobe}
        self.settings = parse(KnnLMSettings, numbers, "memdec-knnlm")
        self.folders, self.index_folder = [Path(folder) for folder in datastore.split("+")], Path(index)
        super().__init__(pretrained, self.settings.weight, **kwargs)

    def _check(self, revision: str | None, trust: bool) -> None:
        self._keys = check_folders(self.base_name, self.folders, self.index_folder, self.settings)

    def _wrap(self, base: Any) -> Wrapper:
        searcher = load_index(self._keys, self.index_folder, self.settings.nprobe, base.device)
        return KnnLMForCausalLM(
            base,
            self._keys,
            searcher,
            weight=self.alpha,
            temperature=self.settings.temperature,
            neighbours=self.settings.neighbours,
            n_vocab=len(self.tokenizer),
        )

    def _set_weight(self) -> None:
        self._model.set_weight(self.alpha)

    def _identity(self) -> dict[str, str]:
        index = artefact.read(self.index_folder, "index")
        numbers = self.settings.model_dump(exclude={"weight"})
        return {"keys": self._keys.recipe, "index": index.recipe, **{key: str(value) for key, value in numbers.items()}}

    def _info(self) -> dict[str, Any]:
        folders = {"datastore": [str(folder) for folder in self.folders], "index": str(self.index_folder)}
        return {**folders, **self.settings.model_dump(exclude={"weight"})}


class MemDecIcRag(WrappedLM):
    """In-Context RAG: the base with the best passage of a corpus before the text; nothing is mixed.

        lm_eval --model memdec-icrag --model_args pretrained=BASE,passages=PASSAGES --tasks ...

    Args:
        pretrained: Base model.
        passages: Folder that `memdec passages` made.
        query: Last tokens that make the query (paper: 32).
        every: Tokens between two retrievals (paper: 4).
        kwargs: As for `WrappedLM`.
    """

    second = False

    def __init__(self, pretrained: str, passages: str, query: int = 32, every: int = 4, **kwargs: Any) -> None:
        self.settings = parse(RetrievalSettings, {"query": query, "every": every}, "memdec-icrag")
        self.folder = Path(passages)
        super().__init__(pretrained, 0.0, **kwargs)

    def _check(self, revision: str | None, trust: bool) -> None:
        self._passages = check_passages(self.base_name, self.folder, self.settings)

    def _wrap(self, base: Any) -> Wrapper:
        return IcRagForCausalLM(
            base, self._passages, query=self.settings.query, every=self.settings.every, n_vocab=len(self.tokenizer)
        )

    def set_alpha(self, alpha: float) -> None:
        raise ConfigError(f"memdec-icrag: expected no weight, found {alpha}: a passage is read, nothing is mixed")

    def _identity(self) -> dict[str, str]:
        recipe = artefact.read(self.folder, "passages").recipe
        return {"passages": recipe, "query": str(self.settings.query), "every": str(self.settings.every)}

    def _info(self) -> dict[str, Any]:
        return {"passages": str(self.folder), "query": self.settings.query, "every": self.settings.every}
