"""Model cards: README.md of a trained folder, made of nothing but its own facts, settings and inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from memdec.artefacts import artefact

Kind = Literal["model", "memory", "lora"]

_PAPER = "[arXiv 2508.09874](https://arxiv.org/abs/2508.09874)"
_TITLES = {"model": "Language model", "memory": "Memory decoder", "lora": "LoRA adapter"}
# fact -> what it is called in the card
_TEXT = {
    "corpus_sha256": "corpus sha256 (128 bits)",
    "trained_tokens": "trained tokens",
}
_RESULTS = {
    "parameters": "parameters",
    "updates": "updates",
    "flops": "floating point operations",
    "train_loss": "training loss",
    "valid_perplexity": "perplexity on valid",
}
_COMMANDS = {
    "model": "lm_eval --model hf --model_args pretrained=MODEL --tasks memdec_ppl",
    "memory": "lm_eval --model memdec-interp --model_args pretrained=BASE,memory=MEMORY,alpha=0.6 --tasks memdec_ppl",
    "lora": "lm_eval --model hf --model_args pretrained=BASE,peft=LORA --tasks memdec_ppl",
}
_LOAD = {
    "model": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL").eval()
tokenizer = AutoTokenizer.from_pretrained("MODEL")
""",
    "memory": """\
from transformers import AutoTokenizer

from memdec.modeling import MemDecForCausalLM

model = MemDecForCausalLM.from_parts("BASE", ["MEMORY"], [0.6])
tokenizer = AutoTokenizer.from_pretrained("BASE")
""",
    "lora": """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "LORA").eval()
tokenizer = AutoTokenizer.from_pretrained("BASE")
""",
}
_GENERATE = """\
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
"""
_PLACES = {
    "model": "`MODEL` is this folder.",
    "memory": "`BASE` is a model with the same tokenizer, `MEMORY` is this folder, `alpha` is the memory's weight.",
    "lora": "`BASE` is the model that was adapted, `LORA` is this folder.",
}


def write(out: Path, *, kind: Kind, facts: dict[str, Any], settings: dict[str, Any], inputs: dict[str, str]) -> None:
    """Write README.md with front matter for the Hub; a fact that is not given is left out.

    Args:
        out: The folder.
        kind: What is in it.
        facts: Of its manifest.
        settings: Of its manifest; may be nested.
        inputs: Name -> recipe of the artefacts that it was made of.
    """
    sections = [
        _front_matter(kind),
        f"# {_TITLES[kind]}\n\n{_what(kind, inputs)}",
        _section("Trained on", _table("fact", _corpus(facts) | _named(_TEXT, facts))),
        _section("Training", _training(facts, settings, inputs)),
        _section("Needs", _needs(facts)),
        _section("Use", f"{_PLACES[kind]}\n\n```sh\n{_COMMANDS[kind]}\n```\n\n```python\n{_LOAD[kind]}{_GENERATE}```"),
        _section("Method", f"Memory Decoder: A Pretrained, Plug-and-Play Memory for Large Language Models, {_PAPER}."),
    ]
    artefact.write_text(out / "README.md", "\n\n".join(section for section in sections if section) + "\n")


def _front_matter(kind: Kind) -> str:
    tags = {"model": [], "memory": ["memory-decoder"], "lora": ["lora"]}[kind]
    plain = {"library_name": "peft" if kind == "lora" else "transformers", "tags": ["memdec", *tags]}
    return f"---\n{yaml.safe_dump(plain, sort_keys=False)}---"


def _what(kind: Kind, inputs: Mapping[str, str]) -> str:
    if kind == "lora":
        return "A LoRA adapter of a base model, trained on the text of one domain; the base model stays as it is."
    if kind == "memory":
        return (
            "A memory decoder for one domain: a small language model whose next-token distribution is mixed with that of "
            "any base model of the same tokenizer."
        )
    if "memory" in inputs:
        return "A memory decoder with the embeddings of another tokenizer."
    if "model" in inputs:
        return "A base model with all weights trained further on the text of one domain (DAPT)."
    return "A base model trained from scratch."


def _corpus(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"corpus": Path(facts["corpus"]).name} if "corpus" in facts else {}


def _training(facts: Mapping[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    plain = _flat(settings)
    objective = f"Objective: {plain.pop('objective')}." if "objective" in plain else ""
    tables = [
        _table("result", _named(_RESULTS, facts)),
        _table("setting", plain),
        _table("made from", inputs, "recipe"),
    ]
    return "\n\n".join(part for part in (objective, *tables) if part)


def _needs(facts: Mapping[str, Any]) -> str:
    sha256 = facts.get("tokenizer_sha256")
    return f"The tokenizer with the fingerprint `{sha256}` (`memdec.text.tokens.fingerprint`)." if sha256 else ""


def _named(names: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts[fact] for fact, name in names.items() if facts.get(fact) is not None}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; unset ones are left out."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            found[prefix + name] = value
    return found


def _table(head: str, rows: Mapping[str, Any], value: str = "value") -> str:
    lines = [f"| {name} | {_cell(each)} |" for name, each in rows.items()]
    return "\n".join([f"| {head} | {value} |", "|---|---|", *lines]) if rows else ""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:,.0f}" if value.is_integer() and abs(value) < 1e12 else f"{value:.6g}"
    else:
        text = f"{value:,}" if type(value) is int else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""
