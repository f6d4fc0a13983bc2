"""Made text and tiny models for the tests."""

import random

from memdec.config import ModelSpec, TrainSettings

CONTEXT = 32


def made_text(n_documents: int, seed: int) -> str:
    """Documents of a little grammar, parted by blank lines."""
    rng = random.Random(seed)
    nouns, verbs = (
        ["matrix", "window", "token", "model", "sample", "kernel", "vector", "index"],
        ["returns", "scales", "shifts", "reads", "writes"],
    )
    documents = []
    for number in range(n_documents):
        lines = [
            f"The {rng.choice(nouns)} {number} {rng.choice(verbs)} the {rng.choice(nouns)} of size {rng.randrange(99)}."
            for _ in range(rng.randrange(2, 6))
        ]
        documents.append("\n".join(lines))
    return "\n\n".join(documents)


def spec(width: int, **changes: object) -> ModelSpec:
    """A tiny GPT-2-style model."""
    train_settings = TrainSettings(epochs=0.2, learning_rate=1e-2)
    plain = {
        "family": "t",
        "tokenizer": "bpe",
        "architecture": "gpt2",
        "width": width,
        "layers": 2,
        "heads": 2,
        "corpus": "made",
        "train": train_settings,
    }
    return ModelSpec.model_validate(plain | changes)
