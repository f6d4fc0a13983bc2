"""Configuration: typed, frozen, all problems at once."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from memdec import config as cfg
from memdec.errors import ConfigError
from memdec.settings import portable

MINI = Path(__file__).resolve().parents[2] / "config" / "mini.yaml"


def changed(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(MINI.read_text()) | changes))
    return path


def test_mini_is_valid_and_frozen() -> None:
    config = cfg.load(MINI)
    assert config.scale == "mini"
    with pytest.raises(ValidationError):
        config.stride = 3  # type: ignore[misc]


def test_all_problems_in_one_line(tmp_path: Path) -> None:
    path = changed(tmp_path, strid=3, seeds=["x"], memory={"kl_weight": 2})
    with pytest.raises(ConfigError) as caught:
        cfg.load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in (str(path), "strid: unknown key", "seeds.0", "memory.kl_weight", "found 2"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domains": ["torhc"]}, r"domains: expected one of general, pandas, .*torch, found torhc"),
        ({"scale": "all"}, "scale: expected a name of no other file in results, found all; choose another one"),
        ({"scale": "reference"}, "scale: expected a name of no other file in results, found reference"),
        ({"key_model": "x"}, "key_model: expected one of"),
        ({"seeds": [True]}, r"seeds\.0: Input should be a valid integer, found True"),
        ({"evaluate": {"temperatures": ["1", 4]}}, r"temperatures\.0: Input should be a valid number, found '1'"),
        ({"lora": {"learning_rate": "2e-5"}}, r"valid number, found '2e-5'; YAML takes that for text, write 2\.0e-5$"),
        ({"lora": {"learning_rate": "1e-3"}}, r"valid number, found '1e-3'; YAML takes that for text, write 1\.0e-3$"),
        ({"lora": {"learning_rate": "1.5e1"}}, r"found '1.5e1'; YAML takes that for text, write 1\.5e\+1$"),
        ({"lora": {"epochs": "ten"}}, r"epochs: Input should be a valid number, found 'ten'$"),
        ({"stride": 500}, r"stride: expected at most context \(128\), found 500"),
        ({"corpora": {"a": {"source": "files"}}}, "either 'path' .* or 'paths'"),
        (
            {"datastore": {"stored": False}},
            "index.kind: expected ivfpq or ivfflat with datastore.stored false, found auto",
        ),
        (
            {"datastore": {"stored": False}, "index": {"kind": "cells"}},
            "index.kind: expected ivfpq or ivfflat with datastore.stored false, found cells",
        ),
        ({"index": {"kind": "cells", "centroids": 8}}, r"targets.nprobe: expected at most 8 cells"),
        (
            {"targets": {"nprobe": 32, "max_tv": 0.01}},
            r"targets.max_tv: expected it in place of nprobe, found both \(0.01, nprobe 32\); leave out one",
        ),
        ({"targets": {"max_tv": 1}}, "targets.max_tv: .* less than 1, found 1"),
        (
            {"index": {"kind": "cells"}, "targets": {"neighbours": 100, "max_tv": 0.01}, "calibrate": None},
            "targets.max_tv: expected one of k 64, 256, 1024, at which the index measures it, found 100",
        ),
        (
            {"index": {"kind": "cells"}, "targets": {"max_tv": 0.01}, "calibrate": {"temperatures": [1, 3]}},
            "targets.max_tv: expected one of tau 0.25, .*, 256, at which the index measures it, found 3",
        ),
        (
            {"datastore": {"stored": False}, "calibrate": {}},
            "calibrate: expected none with datastore.stored false, found it",
        ),
        ({"datastore": {"stored": False}}, "targets.released: expected true with datastore.stored false, found false"),
        ({"datastore": {"stored": False, "shards": 4}}, "datastore.shards: expected 1 .* found 4"),
        (
            {"index": {"kind": "ivfpq", "centroids": 8}},
            r"targets.nprobe: expected at most 8 cells",
        ),
        ({"index": {"kind": "exact", "opq": True}}, "index.opq: expected false with index.kind exact, found true"),
        ({"index": {"seed": -1}}, "index.seed: .* found -1"),
        ({"calibrate": {"tops": []}}, "calibrate.tops: .* at least 1 item"),
        (
            {"fidelity": {"seed": 7}},
            "fidelity.seed: expected none, as the seed of the run is taken, found 7; remove it",
        ),
        ({"shapes": {"seed": 0}}, "shapes.seed: expected none, "),
        ({"targets": {"temperature": float("inf")}}, "targets.temperature: .* finite number, found inf"),
        (
            {"memories": {"other": {"other_domain": True, "dapt": True}}},
            "expected only models beside other_domain, found dapt|expected only memory_model and models beside dapt",
        ),
        (
            {"memories": {"other": {"other_domain": True}, "moved": {"adapt": "other", "key_model": "qwen2-M"}}},
            "moved.adapt: expected a memory that is trained, found other with other_domain true",
        ),
        ({"evaluate": {"alphas": [1.5]}}, "alphas.0: .* found 1.5"),
    ],
)
def test_messages(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cfg.load(changed(tmp_path, **change))


def test_the_control_of_a_domain_is_the_default_memory_of_the_next(tmp_path: Path) -> None:
    config = cfg.load(changed(tmp_path, memories={"other": {"other_domain": True}}, studies={}))
    assert [config.next_domain(domain) for domain in ("torch", "pandas", "sklearn")] == ["pandas", "sklearn", "torch"]
    other, own = config.variant("other"), config.variant("memdec")
    assert (other.own, own.own) == (False, True)
    assert other.models == own.models == config.bases
    alone = cfg.load(changed(tmp_path, memories={"other": {"other_domain": True}}, domains=["torch"]))
    assert alone.variant("other").models == []  # no other domain, no control
    memory = config.memory_for("gpt2-L")
    assert memory is not None
    assert memory.name == "memdec"


def test_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mini\.yaml"):
        cfg.load(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        cfg.load(tmp_path / "b.yaml")


def test_portable_settings_name_no_folder_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMDEC_TEST_DATA", "/some/data")
    monkeypatch.setenv("MEMDEC_SMOL", "/some/smollm2")
    plain = {
        "paths": ["/some/data/train.txt", "/some/database"],
        "model": "/some/data",
        "base": "/some/smollm2",
        "n": 3,
    }
    assert portable(plain) == {
        "paths": ["${MEMDEC_TEST_DATA}/train.txt", "/some/database"],
        "model": "${MEMDEC_TEST_DATA}",
        "base": "${MEMDEC_SMOL}",
        "n": 3,
    }
