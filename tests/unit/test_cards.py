"""Model cards say what is in the manifest, no more; their code runs."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from memdec.models import cards

FACTS = {
    "corpus": "../../corpora/torch",
    "corpus_sha256": "c0ffee",
    "tokenizer_sha256": "beef",
    "trained_tokens": 64000.0,
    "valid_perplexity": 60.5678901,
    "flops": 1.25e15,
}


def card(folder: Path, kind: cards.Kind, **given: dict[str, Any]) -> str:
    cards.write(folder, **{"kind": kind, "facts": {}, "settings": {}, "inputs": {}, **given})
    return (folder / "README.md").read_text()


def code(text: str, language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


@pytest.mark.parametrize(("kind", "library"), [("model", "transformers"), ("memory", "transformers"), ("lora", "peft")])
def test_front_matter(kind: cards.Kind, library: str, tmp_path: Path) -> None:
    _, front, body = card(tmp_path, kind).split("---\n", 2)
    plain = yaml.safe_load(front)
    assert plain["library_name"] == library
    assert "memdec" in plain["tags"]
    assert body.lstrip().startswith("# ")


def test_facts_and_settings_are_there(tmp_path: Path) -> None:
    settings = {"objective": "hybrid", "learning_rate": 0.004, "patience": None, "train": {"epochs": 16.0}}
    text = card(tmp_path, "memory", facts=FACTS, settings=settings, inputs={"targets 0": "feed"})
    for line in (
        "| corpus | torch |",
        "| corpus sha256 (128 bits) | c0ffee |",
        "| trained tokens | 64,000 |",
        "| perplexity on valid | 60.5679 |",
        "| floating point operations | 1.25e+15 |",
        "Objective: hybrid.",
        "| learning_rate | 0.004 |",
        "| train.epochs | 16 |",
        "| targets 0 | feed |",
    ):
        assert line in text.splitlines()
    assert "`beef`" in text
    assert "arxiv.org/abs/2508.09874" in text
    assert "patience" not in text


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    text = card(tmp_path, "memory", facts={"valid_perplexity": 3.0})
    assert "| perplexity on valid | 3 |" in text
    for word in (
        "corpus",
        "Trained on",
        "trained tokens",
        "operations",
        "Objective",
        "fingerprint",
        "None",
        "setting",
        "recipe",
    ):
        assert word not in text, word


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"tokenizer": "a", "tokens": "b"}, "trained from scratch"),
        ({"model": "a", "tokens": "b"}, "DAPT"),
        ({"memory": "a", "tokenizer": "b"}, "another tokenizer"),
    ],
)
def test_kinds_of_model(inputs: dict[str, str], expected: str, tmp_path: Path) -> None:
    assert expected in card(tmp_path, "model", inputs=inputs)


def test_commands(tmp_path: Path) -> None:
    command = code(card(tmp_path, "memory"), "sh").strip()
    assert command == (
        "lm_eval --model memdec-interp --model_args pretrained=BASE,memory=MEMORY,alpha=0.6 --tasks memdec_ppl"
    )
    assert "--model hf --model_args pretrained=MODEL " in code(card(tmp_path, "model"), "sh")
    assert "--model hf --model_args pretrained=BASE,peft=LORA " in code(card(tmp_path, "lora"), "sh")


def run(text: str, **places: Path) -> str:
    source = code(text, "python")
    for name, folder in places.items():
        assert f'"{name}"' in source
        source = source.replace(f'"{name}"', repr(str(folder)))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "README.md", "exec"), {})
    return printed.getvalue()


def test_the_code_for_a_memory_runs(base_folder: Path, small_folder: Path, tmp_path: Path) -> None:
    printed = run(card(tmp_path, "memory"), BASE=base_folder, MEMORY=small_folder)
    assert printed.startswith("The")
    assert len(printed.rstrip("\n")) > len("The")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
def test_the_code_for_a_model_and_a_lora_runs(base_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from memdec.models import loading

    assert run(card(tmp_path, "model"), MODEL=base_folder).startswith("The")
    adapter = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    get_peft_model(loading.load(base_folder), adapter).save_pretrained(tmp_path / "lora")
    # peft leaves a card of its own
    assert run(card(tmp_path / "lora", "lora"), BASE=base_folder, LORA=tmp_path / "lora").startswith("The")
