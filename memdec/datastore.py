"""Stage `datastore`: one key per position of the train split, the input of the last layer's MLP (paper, section 3.1).

The key of position p is read at p - 1, from the window that gives it the most left context. Only the decoder runs, not
the output head. Output: `keys.npy` [N, D] in float16 or float32, memory-mapped by its readers; the values are the
token stream itself.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from memdec import artifacts, models, tokens
from memdec.config import DatastoreSettings
from memdec.errors import NumericsError
from memdec.windows import Window, windows


def run(model_folder: Path, stream: Path, out: Path, settings: DatastoreSettings, *, context: int, stride: int) -> None:
    """Make the datastore of a token stream with the keys of a model."""
    source = artifacts.read(stream, "tokens")
    model_manifest = artifacts.read(model_folder, "model")
    tokens.check_same(
        source.facts["tokenizer_sha256"], model_manifest.facts["tokenizer_sha256"], f"{model_folder} with {stream}"
    )
    plain = {**settings.model_dump(mode="json"), "context": context, "stride": stride}
    with artifacts.building(
        out, "datastore", plain, {"model": model_manifest.recipe, "tokens": source.recipe}
    ) as build:
        if build is None:
            return
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = models.load(model_folder).to(device).eval()
        prefix = tokens.prefix_id(tokens.load_tokenizer(str(model_folder)))
        data = tokens.load_stream(stream, "train")
        width = models.head_weight(model).shape[1]
        keys = np.lib.format.open_memmap(
            out / "keys.npy", mode="w+", dtype=np.dtype(settings.dtype), shape=(len(data), width)
        )
        parts = windows(len(data), context, stride)
        for part, block in tqdm(
            key_blocks(model, data, parts, prefix, settings.batch_size),
            total=len(parts),
            desc="keys",
            unit="window",
            mininterval=2,
        ):
            keys[part.first : part.end] = _narrow(block, part, settings.dtype)
        keys.flush()
        build.facts.update(
            keys=len(data),
            width=width,
            tokens_sha256=source.facts["sha256"]["train"],
            tokenizer_sha256=source.facts["tokenizer_sha256"],
        )


@torch.inference_mode()
def key_blocks(model: Any, data: NDArray[np.integer], parts: list[Window], prefix: int, batch_size: int) -> Any:
    """Yield (window, float32 keys of its scored positions, shape (n_scored, D)), window by window."""
    mlp = models.last_mlp(model)
    decoder = models.decoder(model)
    for begin in range(0, len(parts), batch_size):
        batch = parts[begin : begin + batch_size]
        ids = torch.zeros(len(batch), max(part.n_inputs for part in batch), dtype=torch.long)
        for row, part in enumerate(batch):
            ids[row, : part.n_inputs] = torch.from_numpy(part.inputs(data, prefix))
        with models.captured_input(mlp) as seen:
            decoder(input_ids=ids.to(model.device), use_cache=False)
        block = seen[-1].float().cpu().numpy()
        for row, part in enumerate(batch):
            yield part, block[row, part.first - part.begin : part.n_inputs]


def _narrow(block: NDArray[np.float32], part: Window, dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        narrow: NDArray[Any] = block.astype(dtype)
    if not np.isfinite(narrow).all():
        position = part.first + int(np.argwhere(~np.isfinite(narrow))[0, 0])
        why = (
            "the model gives NaN or inf"
            if not np.isfinite(block).all()
            else f"beyond the range of {dtype}; use dtype float32"
        )
        raise NumericsError(f"datastore: expected finite keys, found one that is not at position {position} ({why})")
    return narrow


def load_keys(folder: Path) -> NDArray[np.floating]:
    """Memory-mapped keys, shape (N, D)."""
    artifacts.read(folder, "datastore")
    keys: NDArray[np.floating] = np.load(folder / "keys.npy", mmap_mode="r", allow_pickle=False)
    return keys
