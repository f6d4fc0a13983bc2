"""Make text, token streams, datastores and tiny models for the tests."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memdec.artefacts import artefact
from memdec.maths.windows import windows
from memdec.settings import DatastoreSettings, ModelSpec, TrainSettings

CONTEXT = 32


def made_text(n_documents: int, seed: int) -> str:
    """Documents from a small grammar, separated by blank lines."""
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


def other_text(n_documents: int, seed: int) -> str:
    """Documents from another grammar with the same nouns."""
    rng = random.Random(seed)
    nouns = ["matrix", "window", "token", "model", "sample", "kernel", "vector", "index"]
    documents = []
    for _ in range(n_documents):
        lines = [
            f"size {rng.randrange(99)} of {rng.choice(nouns)}: {rng.choice(nouns)} reads {rng.choice(nouns)}?"
            for _ in range(rng.randrange(2, 6))
        ]
        documents.append("\n".join(lines))
    return "\n\n".join(documents)


def run_memdec(capsys: Any, *words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a `memdec` command."""
    from memdec import cli

    before, sys.argv = sys.argv, ["memdec", *map(str, words)]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return code, out, err


def spec(width: int, **changes: object) -> ModelSpec:
    """Config entry of a tiny GPT-2 model."""
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


def write_tokens(folder: Path, values: NDArray[np.integer], tokenizer: str = "none") -> Path:
    """Write a token artefact with this train split, without a corpus."""
    with artefact.building(folder, "tokens", {"values": artefact.digest(values.tolist())}, {}) as build:
        assert build is not None
        np.save(folder / "train.npy", values)
        build.facts.update(sha256={"train": artefact.file_digest(folder / "train.npy")}, tokenizer_sha256=tokenizer)
    return folder


def signed(folder: Path, **facts: object) -> Path:
    """Make the manifest of a folder fit the files as they are now, and change facts, as code with a fault would write it."""
    file = folder / artefact.MANIFEST
    said = json.loads(file.read_text())
    for name in said["files"]:
        path = folder / name
        said["files"][name] = {"bytes": path.stat().st_size, "xxh3_128": artefact.content_hash(path)}
    said["facts"].update(facts)
    sign(file, said)
    return folder


def sign(file: Path, said: dict[str, Any]) -> None:
    """Write a manifest with the checksum that fits it."""
    file.write_text(json.dumps({**said, "checksum": artefact.signature(said)}))


def write_store(
    folder: Path,
    keys: NDArray[np.floating],
    stream: Path,
    *,
    edges: Sequence[int] | None = None,
    model: str = "by hand",
    vocab: int = 60_000,
) -> list[Path]:
    """Write datastore shards of given keys, without a model; `edges` are the shard boundaries."""
    edges = [0, len(keys)] if edges is None else edges
    settings = DatastoreSettings(dtype=str(keys.dtype), shards=len(edges) - 1).model_dump(mode="json")
    tokens = artefact.read(stream, "tokens")
    inputs = {"model": model, "tokens": tokens.recipe}
    folders = [folder / str(shard) for shard in range(len(edges) - 1)]
    for shard, path in enumerate(folders):
        begin, end = edges[shard], edges[shard + 1]
        plain = {**settings, "context": 16, "stride": 8, "shard": shard, "precision": "float32"}
        with artefact.building(path, "datastore", plain, inputs) as build:
            assert build is not None
            np.save(path / "keys.npy", keys[begin:end])
            build.facts.update(
                begin=begin,
                end=end,
                positions=len(keys),
                width=keys.shape[1],
                keys_recipe=artefact.digest([keys.tolist(), model]),
                tokens_sha256=tokens.facts["sha256"]["train"],
                vocab_size=vocab,
                model="nowhere",
                tokens=str(stream.resolve()),
            )
    return folders


def plain_scores(folder: Path, stream: list[int], prefix: int, stride: int) -> np.ndarray:
    """log p of every token, computed one window and one position at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    scores = []
    with torch.no_grad():
        for part in windows(len(stream), CONTEXT, stride):
            before = ([prefix, *stream])[part.begin : part.end]
            log_p = model(torch.tensor([before])).logits[0].double().log_softmax(-1)
            scores += [float(log_p[p - part.begin, stream[p]]) for p in range(part.first, part.end)]
    return np.array(scores)


def launch(n_processes: int, *arguments: object, **environment: str) -> str:
    """Run a script, or `-m module`, in several connected processes, as `torchrun` does; return their stderr."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(n_processes),
        "--master-port",
        "0",
    ]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *map(str, arguments)]
    plain = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=plain)
    assert done.returncode == 0, done.stderr
    return done.stderr


def write_task_rows(folder: Path) -> Path:
    """A folder for MEMDEC_DATA with a few made rows of every kind of task: labels, options, prompts, free answers."""
    rng = random.Random(0)
    nouns = ["matrix", "window", "token", "model", "sample", "kernel"]

    def line() -> str:
        return f"The {rng.choice(nouns)} {rng.randrange(99)} reads the {rng.choice(nouns)}."

    options = ["returns", "scales the window of size 4", "shifts it"]

    def choices(number: int) -> dict[str, Any]:
        return {"input": f"{line()}\nThe token {number}", "options": options, "gold_index": number * number % 3}

    rows: dict[str, list[dict[str, Any]]] = {
        "cb/test.jsonl": [{"premise": line(), "hypothesis": line(), "label": i % 3} for i in range(12)],
        "rte/test.jsonl": [{"premise": line(), "hypothesis": line(), "label": i % 2} for i in range(12)],
        "fpb/adaptllm_schema.jsonl": [choices(i) for i in range(12)],
        "scotus/adaptllm_schema.jsonl": [choices(i) for i in range(12)],
        "usmle/adaptllm_schema.jsonl": [
            choices(i) | {"options": [f"{option} {i}" for option in options]} for i in range(12)
        ],
        "headline/adaptllm_schema.jsonl": [choices(i) | {"class_id": i % 4} for i in range(24)],
        "unfair_tos/adaptllm_schema.jsonl": [choices(i) | {"gold_index": sorted({i % 2, i % 3})} for i in range(12)],
        "casehold/adaptllm_schema.jsonl": [
            {"input_options": [f"The index {i} writes (holding that {option}" for option in options],
             "output": f") and reads the token {i}.", "gold_index": i * i % 3} for i in range(12)
        ],
        "nq/validation.jsonl": [{"question": f"what reads the {noun}", "answer": ["The window", noun]} for noun in nouns],
    }  # fmt: skip
    for file, listed in rows.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in listed))
    return folder


TASKS = [
    "dcpmi_cb_kl", "dcpmi_rte_kl", "memdec_fpb", "memdec_scotus", "memdec_usmle", "memdec_headline",
    "memdec_unfair_tos", "memdec_casehold", "memdec_nq",
]  # fmt: skip
