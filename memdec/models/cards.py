"""Write the model card (README.md) of a trained folder from its manifest: facts, settings and inputs.

Names come from the user, so everything is escaped: a corpus called `a|b` or `<script>` is shown as such.
"""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData

from memdec.artefacts import artefact, markdown

Kind = Literal["model", "memory", "lora"]

_TAGS: dict[str, list[str]] = {"model": [], "memory": ["memory-decoder"], "lora": ["lora"]}
# fact in the manifest -> name in the card
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


def write(out: Path, *, kind: Kind, facts: dict[str, Any], settings: dict[str, Any], inputs: dict[str, str]) -> None:
    """Write README.md with metadata for the Hub; missing facts are left out.

    Args:
        out: The folder.
        kind: What it contains.
        facts: Facts of its manifest.
        settings: Settings of its manifest; may be nested.
        inputs: Name -> recipe of each artefact that it was made from.
    """
    plain = _flat(settings)
    card = ModelCard.from_template(
        ModelCardData(library_name="peft" if kind == "lora" else "transformers", tags=["memdec", *_TAGS[kind]]),
        template_str=resources.files("memdec.models").joinpath("card.md").read_text(encoding="utf-8"),
        table=_table,
        kind=kind,
        trained_on=_corpus(facts) | _named(_TEXT, facts),
        objective=_name(plain.pop("objective", None)),
        results=_named(_RESULTS, facts),
        settings=plain,
        inputs=inputs,
        tokenizer=_name(facts.get("tokenizer_sha256")),
    )
    artefact.write_text(out / "README.md", f"{card.content}\n")


def _corpus(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"corpus": Path(facts["corpus"]).name} if "corpus" in facts else {}


def _named(names: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts[fact] for fact, name in names.items() if facts.get(fact) is not None}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names; leave out unset ones."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None and value != []:
            found[prefix + name] = value
    return found


def _table(head: str, rows: Mapping[str, Any], value: str = "value") -> str:
    return markdown.table([head, value], [[markdown.escaped(name), _cell(each)] for name, each in rows.items()], 2)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e12 else f"{value:.6g}"
    return f"{value:,}" if type(value) is int else markdown.escaped(str(value))


def _name(value: Any) -> str | None:
    return None if value is None else markdown.escaped(str(value))
