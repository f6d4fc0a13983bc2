"""The one choice of device and precision, and what is said where a GPU is missing or too small."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from memdec import cli
from memdec.artefacts import devices
from memdec.datastore import keys as datastore
from memdec.errors import ConfigError, ResourceError
from memdec.settings import Compute, DatastoreSettings


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that are not really there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8e10))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert devices.pick() == torch.device("cpu")
    assert devices.precision() == "float32"
    assert devices.name() == "cpu"
    assert devices.precision(Compute(precision="bfloat16")) == "bfloat16"
    with pytest.raises(ResourceError, match="expected at least 1 CUDA device"):
        devices.pick(Compute(device="cuda"))


@pytest.mark.usefixtures("gpus")
def test_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.pick() == torch.device("cuda", 0)
    assert devices.precision() == "bfloat16"
    assert devices.name() == "GPU 0"
    assert devices.pick(Compute(device="cpu")) == torch.device("cpu")
    assert devices.precision(Compute(device="cpu")) == "float32"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.pick() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ResourceError, match="expected at least 3 CUDA device"):
        devices.pick()


@pytest.mark.usefixtures("gpus")
def test_a_full_gpu_says_what_to_lower() -> None:
    settings = DatastoreSettings(batch_size=16)
    with (
        pytest.raises(ResourceError, match=r"memdec datastore: .* of 80 GB.* lower 'batch_size' \(now 16\)"),
        devices.one_line_when_full("memdec datastore", settings),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_stage_on_a_gpu_that_is_not_there_or_too_small_ends_with_one_line(
    base_folder: Path,
    token_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--model", str(base_folder), "--tokens", str(token_folder), "--out", str(tmp_path / "d")]
    monkeypatch.setattr(sys, "argv", ["memdec", "datastore", *words, "--context", "32", "--stride", "16"])

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for device, message in (("cuda", "CUDA device"), ("auto", "lower 'batch_size' (now 16)")):
        if device == "auto":
            monkeypatch.setattr(datastore, "_write", full)
        elif torch.cuda.is_available():
            continue
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--device", device])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2
        assert said[-1].startswith("error: ")
        assert message in said[-1]
        assert not (tmp_path / "d" / "manifest.json").exists()


def test_a_model_is_spread_over_all_gpus_only_where_a_stage_can(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Compute(device="all")
    assert devices.pick(compute, spread=True) == torch.device("cuda", 0)
    assert devices.precision(compute) == "bfloat16"
    with pytest.raises(ConfigError, match="device: expected auto, cpu or cuda, found all; only `memdec evaluate`"):
        devices.pick(compute)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 60)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 20)
    devices.check_room(140, "cuda", "weights", "use another dtype", spread=True)
    with pytest.raises(ResourceError, match="weights: expected 141 B free on 2 GPUs, found 140 B; use another dtype"):
        devices.check_room(141, "cuda", "weights", "use another dtype", spread=True)
    with pytest.raises(ResourceError, match="expected 71 B free on cuda, found 70 B"):
        devices.check_room(71, "cuda", "weights", "use another dtype")
