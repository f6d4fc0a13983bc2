"""Random row files and corpus files, whole and damaged: each is read, or refused by one line that names it.

`fuzz.py` runs the cases. A case writes its files into a folder and raises nothing but a `MemDecError`.
"""

import gzip
import json
import lzma
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from memdec.settings import SPLITS, FileCorpus
from memdec.tasks import dcpmi_rows, domain, fetch, perplexity, qa, verbalizers
from memdec.text import corpora

Case = Callable[[Path], None]
_TEXTS = [
    "",
    " ",
    "a word",
    "\ud800",
    "\udfff tail",
    "\x00",
    "\u2028",
    "﻿x",
    "e\u0301",
    "𝔘" * 9,
    "x" * 5000,
    "\r",
    '"',
    "ß",
]
_PLAIN = [text for text in _TEXTS if not any("\ud800" <= c <= "\udfff" or c == "\0" for c in text)]
_NUMBERS = [0, 1, -1, 3, 2**31, 2**63, -(2**63) - 1, 10**400, 1.5, 1e308, float("nan"), float("inf"), True, None]
_FIELDS = [
    *("text", "label", "input", "options", "gold_index", "class_id", "question", "answer", "premise", "hypothesis"),
    *("output", "input_options", "Title", "Class Index", "option_tokens", "gold", "", "\udcff", "row"),
]
_ENCODINGS = ["utf-8"] * 9 + ["utf-8-sig", "utf-16", "utf-16-le", "latin-1"]

# Task, file, loader, a right row. The loaders are those of the task files, which need no model.
_TASKS: list[tuple[str, Callable[..., Any], dict[str, Any], dict[str, Any]]] = [
    ("nq/validation.jsonl", qa.load_nq, {}, {"question": "who?", "answer": ["me", "you"]}),
    ("hotpotqa/validation.jsonl", qa.load_hotpotqa, {}, {"question": "who?", "answer": "me"}),
    ("mr/test.jsonl", dcpmi_rows.load_rows, {"set": "mr", "paper_rows": 3}, {"text": "good", "label": 1}),
    (
        "cb/test.jsonl",
        dcpmi_rows.load_rows,
        {"set": "cb", "paper_rows": 3},
        {"premise": "a", "hypothesis": "b", "label": "neutral"},
    ),
    (
        "agn/test.jsonl",
        dcpmi_rows.load_rows,
        {"set": "agn", "paper_rows": 3},
        {"Title": "a", "Description": "b", "Class Index": 2},
    ),
    ("usmle/adaptllm_schema.jsonl", domain.load_choices, {}, {"input": "a", "options": ["b", "c"], "gold_index": 1}),
    (
        "headline/adaptllm_schema.jsonl",
        domain.load_headlines,
        {},
        {"input": "a", "options": ["b", "c"], "gold_index": 1, "class_id": 3},
    ),
    ("scotus/adaptllm_schema.jsonl", domain.load_multi_gold, {}, {"input": "a", "options": ["b"], "gold_index": [0]}),
    (
        "casehold/adaptllm_schema.jsonl",
        domain.load_casehold,
        {"shots": 0},
        {"input_options": ["a", "b"], "output": " c", "gold_index": 0},
    ),
    ("ner/adaptllm_schema.jsonl", domain.load_entities, {}, {"input": "a", "label": "Ann (person)"}),
    ("convfinqa/adaptllm_schema.jsonl", domain.load_numbers, {}, {"input": "a", "label": "3.5"}),
]


def cases(seed: int, n: int) -> Iterator[tuple[str, Case]]:
    """Name and function of each of `n` cases; the same for the same seed."""
    rng = random.Random(seed)
    makers = (_rows_case, _rows_case, _corpus_case, _corpus_case, _words_case, _parquet_case)
    for number in range(n):
        name, case = rng.choice(makers)(random.Random(rng.random()))
        yield f"{number} {name}", case


def _rows_case(rng: random.Random) -> tuple[str, Case]:
    file, load, metadata, row = rng.choice(_TASKS)
    data = _damaged(rng, _lines(rng, row))

    def case(folder: Path) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        named = {"adaptllm_config": file.split("/")[0], "adaptllm_path": "no/set", "adaptllm_revision": "0" * 40}
        with mock.patch.dict(os.environ, {"MEMDEC_DATA": str(folder)}):
            fetch.verify(folder, [file.split("/")[0]])
            load(**named, **metadata, tokenizer=str(_tokenizer(folder)))

    return f"rows {file}", case


def _corpus_case(rng: random.Random) -> tuple[str, Case]:
    suffix = rng.choice(
        [".txt", ".jsonl", ".JSONL", ".json", ".csv", ".txt.gz", ".txt.xz", ".parquet", ".md", ".dat", ""]
    )
    if "json" in suffix.lower():
        data = _damaged(rng, _lines(rng, {"text": "a text of some words"}))
    else:
        ends = rng.choice(["\n", "\r", "\r\n", "\n\n"])
        texts = rng.choice([_TEXTS, _PLAIN, _PLAIN])
        data = _damaged(rng, ends.join(rng.choice(texts) for _ in range(rng.randrange(30))))
    if suffix.endswith((".gz", ".xz")) and rng.random() < 0.8:
        data = (gzip.compress if suffix.endswith(".gz") else lzma.compress)(data)
        data = _cut(rng, data) if rng.random() < 0.3 else data
    how: dict[str, Any] = {
        "documents": rng.choice(["blank_line", "line", "file"]),
        "field": rng.choice(["text", "text", "text", "label", ""]),
        "min_bytes": rng.choice([1, 5, 1000]),
    }
    split_here = rng.random() < 0.5

    def case(folder: Path) -> None:
        for place in "xyz":
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / f"a{suffix}").write_bytes(data)
        pattern = f"{folder}/*/a{suffix}"
        splits = {split: f"{folder}/{place}/a{suffix}" for split, place in zip(SPLITS, "xyz", strict=True)}
        where = {"path": pattern} if split_here else {"paths": splits}
        corpora.run(FileCorpus.model_validate({"source": "files", **how, **where}), folder / "out")
        for split in SPLITS:
            corpora.load(folder / "out", split)

    return f"corpus {suffix or 'without suffix'}", case


def _words_case(rng: random.Random) -> tuple[str, Case]:
    value: Any = {"labels": [{"name": "negative", "words": ["bad"]}, {"name": "positive", "words": [_value(rng, 2)]}]}
    data = _damaged(rng, _json(rng, value if rng.random() < 0.5 else _value(rng, 3)))

    def case(folder: Path) -> None:
        path = folder / "verbalizers" / "sentiment.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        with mock.patch.dict(os.environ, {"MEMDEC_DATA": str(folder)}):
            fetch.verify(folder, ["verbalizers"])
            verbalizers.read_verbalizer({"verbalizer": "sentiment"})

    return "word list", case


def _parquet_case(rng: random.Random) -> tuple[str, Case]:
    values = rng.choice([["a", "b"], ["a", None], [1, 2], [["a"], []], []])
    column = rng.choice(["text", "text", "body"])
    damage, place = rng.choice([None, None, "cut", "flip"]), rng.random()

    def case(folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / perplexity.WIKITEXT_FOLDER / "test.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({column: values}), path)
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[int(place * len(data))] ^= 16
        path.write_bytes(data[: int(place * len(data))] if damage == "cut" else data)
        with mock.patch.dict(os.environ, {"MEMDEC_DATA": str(folder)}):
            fetch.verify(folder, ["wikitext"])
            perplexity.load_wikitext(tokenizer=str(_tokenizer(folder)))

    return "parquet", case


# --- content ------------------------------------------------------------------------------------------------------


def _lines(rng: random.Random, right: dict[str, Any]) -> str:
    """JSON lines, most of them right."""
    lines = []
    calm = rng.choice(
        [1, 10]
    )  # in half of the files a wrong row is rare, so that what comes after reading is tried too
    for _ in range(rng.randrange(1, 12)):
        row = dict(right)
        kind = rng.random() * calm
        if kind < 0.1:
            row[rng.choice(_FIELDS)] = _value(rng, 3)
        elif kind < 0.15:
            row.pop(rng.choice(list(row)))
        elif kind < 0.2:
            row[rng.choice(list(row))] = _value(rng, 2)
        lines.append(_json(rng, _value(rng, 2) if 0.2 <= kind < 0.22 else row))
        if rng.random() * calm < 0.03:
            lines.append(rng.choice(["", " ", "[" * 60_000, '{"a":' * 5000 + "1" + "}" * 5000, "{", "NaN", "9" * 5000]))
    return rng.choice(["\n", "\n", "\n", "\r\n", "\r"]).join(lines) + rng.choice(["", "\n", "\n\n"])


def _json(rng: random.Random, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=rng.random() < 0.7)
    except ValueError:  # Python writes no integer of thousands of digits
        return "{}"


def _value(rng: random.Random, depth: int) -> Any:
    kind = rng.random()
    if depth and kind < 0.2:
        return [_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if depth and kind < 0.3:
        return {rng.choice(_FIELDS): _value(rng, depth - 1) for _ in range(rng.randrange(3))}
    if kind < 0.35:
        nested: Any = 1
        for _ in range(rng.choice([5, 99, 300])):
            nested = [nested]
        return nested
    return rng.choice(_TEXTS if kind < 0.7 else _NUMBERS)


def _damaged(rng: random.Random, text: str) -> bytes:
    """The bytes of a text in some encoding, at times cut or with wrong bytes."""
    data = _encoded(rng, text)
    kind = rng.random()
    if kind < 0.08:
        return _cut(rng, data)
    if kind < 0.16 and data:
        wrong = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            wrong[rng.randrange(len(wrong))] = rng.randrange(256)
        return bytes(wrong)
    return data


def _encoded(rng: random.Random, text: str) -> bytes:
    try:
        return text.encode(rng.choice(_ENCODINGS), rng.choice(["replace", "surrogatepass"]))
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer without merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*characters, "</s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"
