"""The choice of device and precision for all stages.

`auto` means the GPU if there is one, with bfloat16 weights if the GPU supports them, and else the CPU with float32.
Losses, log-probabilities and sums are always float32 or float64.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from memdec.artefacts import resources
from memdec.artefacts.resources import size
from memdec.errors import ConfigError, ResourceError
from memdec.settings import AUTO, Compute

Precision = Literal["float32", "bfloat16", "float16"]


def pick(compute: Compute = AUTO, *, spread: bool = False) -> torch.device:
    """The device to compute on. Under a launcher each process has its own GPU.

    Args:
        compute: What is asked for.
        spread: Whether the stage can spread a model over all GPUs; the device is then the first of them.

    Raises:
        ConfigError: `device: all` is asked for, and the stage cannot.
        ResourceError: The requested GPU does not exist.
    """
    if compute.device == "all" and not spread:
        raise ConfigError(
            "device: expected auto, cpu or cuda, found all; only `memdec evaluate` and `memdec harness` spread a model over GPUs"
        )
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if compute.device == "cpu" or (compute.device == "auto" and not there):
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number >= there:
        raise ResourceError(
            f"device: expected at least {number + 1} CUDA device(s) for 'device: {compute.device}', found {there}; set "
            "'device: cpu' or auto, or look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", number)


def pick_for(asked: torch.device | None) -> torch.device:
    """The device asked for, else the one of `auto`."""
    return asked or pick()


def precision(compute: Compute = AUTO) -> Precision:
    """The torch name of the weights' type: float32, bfloat16 or float16."""
    if compute.precision != "auto":
        return compute.precision
    on_gpu = pick(compute, spread=True).type == "cuda"
    return "bfloat16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def name(compute: Compute = AUTO) -> str:
    """The name of the device that `pick` chooses, for manifests and records."""
    return described(pick(compute))


def described(device: torch.device) -> str:
    """The name of a device: that of the GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def free_memory(device: torch.device) -> int:
    """Bytes of memory that can be used: the device's free memory and what torch has reserved but does not use."""
    if device.type != "cuda":
        return resources.free_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)


def is_cuda(device: str | torch.device) -> bool:
    """Whether a device is a CUDA GPU."""
    return torch.device(device).type == "cuda"


def check_room(n_bytes: float, device: str | torch.device, what: str, instead: str, *, spread: bool = False) -> None:
    """Check that a device, or with `spread` all GPUs together, has `n_bytes` of free memory; `instead` is the next step.

    Raises:
        ResourceError: The free memory is too small.
    """
    if not is_cuda(device):
        resources.check_memory(n_bytes, what, instead)
        return
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if spread else [torch.device(device)]
    free = sum(free_memory(gpu) for gpu in gpus)
    if n_bytes > free:
        where = f"{len(gpus)} GPUs" if spread else device
        raise ResourceError(f"{what}: expected {size(n_bytes)} free on {where}, found {size(free)}; {instead}")


@contextmanager
def one_line_when_full(what: str, settings: Any = None) -> Iterator[None]:
    """Turn torch's out-of-memory error into one line that says which setting to lower.

    Raises:
        ResourceError: The GPU is too small.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        batch = getattr(settings, "batch_size", None)
        lower = "'context'" if batch is None else f"'batch_size' (now {batch})"
        device = pick()
        room = f" of {size(torch.cuda.get_device_properties(device).total_memory)}" if device.type == "cuda" else ""
        raise ResourceError(
            f"{what}: expected all of it to fit on the GPU{room}, found it full "
            f"({' '.join(str(error).split('.')[0].split())[:100]}); lower {lower}, choose 'precision: bfloat16', or use a larger GPU"
        ) from None
