"""Stage `index`: the search structure over the keys of a datastore (FAISS; exact Flat, squared L2)."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from memdec import artifacts
from memdec.config import IndexSettings
from memdec.datastore import load_keys

_BLOCK = 65536  # keys per add: bounds the float32 copy


def run(datastore: Path, out: Path, settings: IndexSettings) -> None:
    """Build `index.faiss` over all keys."""
    source = artifacts.read(datastore, "datastore")
    with artifacts.building(out, "index", settings, {"datastore": source.recipe}) as build:
        if build is None:
            return
        keys = load_keys(datastore)
        index = faiss.IndexFlatL2(keys.shape[1])
        for begin in tqdm(range(0, len(keys), _BLOCK), desc="index", unit="block", mininterval=2):
            index.add(np.ascontiguousarray(keys[begin : begin + _BLOCK], dtype=np.float32))
        faiss.write_index(index, str(out / "index.faiss"))
        build.facts.update(keys=index.ntotal, width=index.d, exact=True)


def load(folder: Path) -> Any:
    """The FAISS index of an index folder."""
    artifacts.read(folder, "index")
    return faiss.read_index(str(folder / "index.faiss"))
