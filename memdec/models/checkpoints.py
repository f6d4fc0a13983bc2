"""What a checkpoint holds: its weight files, whether a load took all of them, and its generation settings."""

import json
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from memdec.errors import ModelError, outside

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with the weights of a model folder, and the index if there are several.

    Raises:
        ModelError: There are none, one cannot be read, or the index names a tensor that is not there.
    """
    if (folder / _SINGLE).is_file():
        _tensors(folder / _SINGLE)
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        others = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        raise ModelError(
            f"{folder}: expected weights in {_SINGLE} or {_INDEX}, found {_some(others) or 'none'}; "
            + ("load it with transformers and save it again with save_pretrained" if others else "get the files again")
        )
    with outside(ModelError, folder / _INDEX, "an index of weight files", "get the files again"):
        place: dict[str, str] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = {name: _tensors(folder / name) for name in sorted(set(place.values()))}
    absent = [tensor for tensor, name in place.items() if tensor not in shards[name]]
    if absent or not shards:
        raise ModelError(
            f"{folder / _INDEX}: expected tensors that are in the named files, found {len(absent)} that are not "
            f"({_some(absent)}); get the files again"
        )
    return [folder / _INDEX, *(folder / name for name in shards)]


def _tensors(file: Path) -> dict[str, str]:
    """Names and types of the tensors in a safetensors file; only its header is read."""
    from safetensors import safe_open

    with (
        outside(ModelError, file, "a whole safetensors file", "get it again"),
        safe_open(file, framework="pt") as inside,
    ):
        return {name: str(inside.get_slice(name).get_dtype()) for name in inside.keys()}  # noqa: SIM118


def check_types(folder: Path, model: Any) -> None:
    """Check that the files of a model have no weight as integers, which transformers would take as numbers.

    Raises:
        ModelError: They have one, and the model is not quantised.
    """
    if getattr(model.config, "quantization_config", None) is not None or not folder.is_dir():
        return
    if not ((folder / _SINGLE).is_file() or (folder / _INDEX).is_file()):
        return
    ours = {name for name, weight in model.named_parameters() if weight.is_floating_point()}
    ours |= {name.removeprefix(f"{model.base_model_prefix}.") for name in ours}
    files = (file for file in weight_files(folder) if file.suffix == ".safetensors")
    stored = {name: kind for file in files for name, kind in _tensors(file).items() if name in ours}
    wrong = [f"{name} {kind}" for name, kind in stored.items() if "F" not in kind]  # F32, BF16, F8_E4M3 ...
    if wrong:
        raise ModelError(
            f"{folder}: expected weights of {type(model).__name__} as floating point numbers, found {len(wrong)} as others "
            f"({_some(wrong)}); get the files again"
        )


def changed(name: str | Path, model: Any, *, subfolder: str = "", revision: str | None = None) -> int:
    """The number of weights of a model whose first row is not that of the files it should be from.

    A merged adapter and a training change first rows too. Weights that have another name or form in the files are not
    compared, nor are those of a quantised model or of a Hub id whose files are not in the usual cache.

    Raises:
        ModelError: A folder has no weights that can be read.
    """
    folder = Path(name, subfolder) if Path(name).is_dir() else _cached(str(name), subfolder, revision)
    if folder is None or getattr(model.config, "quantization_config", None) is not None:
        return 0
    ours = dict(model.named_parameters())
    ours |= {key.removeprefix(f"{model.base_model_prefix}."): weight for key, weight in ours.items()}
    return sum(_differ(file, ours) for file in weight_files(folder) if file.suffix == ".safetensors")


def _cached(name: str, subfolder: str, revision: str | None) -> Path | None:
    """The folder with the weights of a Hub id in the cache."""
    from huggingface_hub import try_to_load_from_cache

    for file in (_SINGLE, _INDEX):
        found = try_to_load_from_cache(name, f"{subfolder}/{file}".lstrip("/"), revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _differ(file: Path, ours: Mapping[str, Any]) -> int:
    """How many tensors of a file have another number of rows, or another first row, than the weights of the same name."""
    import torch
    from safetensors import safe_open

    found = 0
    with safe_open(file, framework="pt") as inside:
        for name in ours.keys() & set(inside.keys()):
            stored, weight = inside.get_slice(name), ours[name]
            shape = stored.get_shape()
            if weight.is_meta or not shape or shape[1:] != list(weight.shape[1:]):
                continue
            found += shape[0] != len(weight) or not torch.equal(stored[:1].to(weight.dtype), weight[:1].cpu())
    return found


# Constants that earlier versions of transformers saved among the weights: causal masks.
_MASKS = re.compile(r"\.(attn|attention)\.(masked_)?bias$")


def check_report(report: Mapping[str, Any], name: str | Path, model: str) -> None:
    """Check the report of a load.

    Args:
        report: `missing_keys`, `unexpected_keys`, and if known `mismatched_keys` (name, shape in the file, shape).
        name: Where the files are.
        model: What they were loaded into, for the message.

    Raises:
        ModelError: A weight of the model is missing, a file has one that the model lacks, or a shape differs.
    """
    left_over = [key for key in report["unexpected_keys"] if not _MASKS.search(key)]
    shapes = [
        f"{key} {list(found)} instead of {list(wanted)}" for key, found, wanted in report.get("mismatched_keys", ())
    ]
    wrong = [("missing", report["missing_keys"]), ("left over", left_over), ("of another shape", shapes)]
    found = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in wrong if keys]
    if found:
        raise ModelError(
            f"{name}: expected all weights of {model} and no others, found {', '.join(found)}; get the files again, or "
            "correct config.json"
        )


def _some(names: Collection[str], most: int = 3) -> str:
    return ", ".join(sorted(names)[:most]) + (" ..." if len(names) > most else "")


def repaired_file(name: str | Path, kwargs: Mapping[str, Any]) -> Any | None:
    """A valid form of a checkpoint's generation_config.json, if it has one that is not; else None.

    Published checkpoints have settings that contradict each other, such as a temperature without `do_sample`.
    transformers loads them, or does not, and refuses to save them after a training.
    """
    from transformers.utils import cached_file

    names = ("revision", "cache_dir", "token", "local_files_only")
    where = {key: kwargs[key] for key in names if kwargs.get(key) is not None}
    file = cached_file(
        name,
        "generation_config.json",
        subfolder=kwargs.get("subfolder") or "",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **where,
    )
    if file is None:
        return None
    with outside(ModelError, file, "generation settings as a JSON object", "correct the file, or remove it"):
        said = dict(json.loads(Path(file).read_text(encoding="utf-8")))
    return None if _valid(said) else _repaired(said, file)


def repair_generation(model: Any, name: str | Path) -> None:
    """Drop what is not valid from settings that an old checkpoint has in its config.json."""
    settings = getattr(model, "generation_config", None)
    if settings is not None and not _valid(settings.to_diff_dict()):
        model.generation_config = _repaired(settings.to_diff_dict(), f"{name}: generation settings")


def _valid(said: dict[str, Any]) -> bool:
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_dict(said).validate(strict=True)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def _repaired(said: dict[str, Any], where: object) -> Any:
    """The settings without those that are not valid; those of greedy decoding stay. A warning names the others."""
    from transformers import GenerationConfig

    kept: dict[str, Any] = {}
    # The modes come first, because other settings are valid only in one of them.
    for key in sorted(said, key=lambda key: key not in ("do_sample", "num_beams", "return_dict_in_generate")):
        if _valid({**kept, key: said[key]}):
            kept[key] = said[key]
    dropped = {key: value for key, value in said.items() if key not in kept}
    warnings.warn(f"{where}: left out what is not valid there: {dropped}", stacklevel=2)
    return GenerationConfig.from_dict(kept)
