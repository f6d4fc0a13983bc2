"""The baselines as lm-eval models, `memdec-knnlm` and `memdec-icrag`; and `of_system`, which wraps any system.

The code that they share with `memdec-interp` is in `memdec.harness.base_lm`.
"""

from pathlib import Path
from typing import Any

from memdec.harness.base_lm import WrappedLM
from memdec.harness.models import MemDecInterp
from memdec.inference.systems import SYSTEMS, Parts
from memdec.settings import KnnLMSettings, RetrievalSettings, SystemName, parse


class MemDecKnnLM(WrappedLM):
    """The kNN-LM: the base mixed with p_kNN from a datastore made with the same base.

        lm_eval --model memdec-knnlm --model_args pretrained=BASE,datastore=STORE,index=INDEX,temperature=13 --tasks ...

    Args:
        pretrained: Base model that made the keys.
        datastore: Datastore folder; join several shards by `+`.
        index: Index folder over the datastore.
        weight: lambda, the weight of p_kNN (paper: 0.25).
        temperature: tau, divides the squared distance (paper: 1 for GPT-2 small and medium, 13 for large and xl).
        neighbours: k.
        nprobe: Number of cells of an IVF index that are searched.
        kwargs: As for `WrappedLM`.
    """

    name = "memdec-knnlm"

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
        settings: KnnLMSettings = parse(KnnLMSettings, numbers, "memdec-knnlm")
        shards = tuple(Path(folder) for folder in str(datastore).split("+"))
        parts = Parts(base=pretrained, datastore=shards, index=Path(str(index)), knn_lm=settings)
        super().__init__(SYSTEMS["kNN-LM"], parts, settings.weight, **kwargs)


class MemDecIcRag(WrappedLM):
    """In-Context RAG: the base with the best passage of a corpus in front of the text; there is no mixing weight.

        lm_eval --model memdec-icrag --model_args pretrained=BASE,passages=PASSAGES --tasks ...

    Args:
        pretrained: Base model.
        passages: Folder that `memdec passages` made.
        query: Number of last tokens that are the query (paper: 32).
        every: Tokens between two retrievals (paper: 4).
        kwargs: As for `WrappedLM`.
    """

    name = "memdec-icrag"

    def __init__(self, pretrained: str, passages: str, query: int = 32, every: int = 4, **kwargs: Any) -> None:
        settings: RetrievalSettings = parse(RetrievalSettings, {"query": query, "every": every}, "memdec-icrag")
        parts = Parts(base=pretrained, passages=Path(str(passages)), retrieval=settings)
        super().__init__(SYSTEMS["In-Context RAG"], parts, 0.0, **kwargs)


def of_system(name: SystemName, parts: Parts, **kwargs: Any) -> WrappedLM:
    """Make an lm-eval model of a system; dtype, device and spread are those of the parts, `kwargs` as for its class."""
    base = str(parts.base)
    kwargs = {"dtype": parts.dtype, "device": parts.device, **({"parallelize": True} if parts.spread else {}), **kwargs}
    if name == "kNN-LM":
        shards = "+".join(str(shard) for shard in parts.datastore)
        return MemDecKnnLM(base, shards, str(parts.index), **parts.knn_lm.model_dump(), **kwargs)
    if name == "In-Context RAG":
        return MemDecIcRag(base, str(parts.passages), **parts.retrieval.model_dump(), **kwargs)
    more: dict[str, dict[str, Any]] = {
        "base": {},
        "DAPT": {"pretrained": str(parts.dapt)},
        "LoRA": {"peft": str(parts.lora)},
        "MemDec": {"memory": str(parts.memory), "alpha": parts.alpha},
    }
    return MemDecInterp(**{"pretrained": base, **more[name], **kwargs})
