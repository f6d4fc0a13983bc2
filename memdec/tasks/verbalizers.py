"""Verbalizers: the words that stand for each label. Short ones stand in the tasks' YAML, long ones in files.

A file is MEMDEC_DATA/verbalizers/NAME.json: `{"labels": [{"name": ..., "words": [...]}, ...]}`. The lists are those of
knowledgeable prompt tuning (OpenPrompt) and are not part of this project; a hash says whether a copy has the same words.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memdec.errors import CorpusError
from memdec.tasks import rows

# Of `fingerprint`, after the cut to the shortest list where the protocol cuts (sentiment, agn).
SHA256 = {
    "sentiment": "dfc870bd088f436da9ea6a810a2d5c0e930c1734c97be253bd4064a586b50a64",
    "agn": "fd116607a43a6f8e4b97745b544eafd0650829dcc6c39f84f8a6bf7b0ded610b",
    "yahoo": "762cd1747c6ff906ac48d73b4ab423cd5bd74260c53800573a6c6bc79d9cea3a",
}


def parse_text(text: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Words by label from a `knowledgeable_verbalizer.txt`: one line per label, words parted by commas.

    As many words are left in each list as the shortest one has (before any token is looked at).

    Args:
        text: Of the file.
        names: Of the labels, in the order of the lines.

    Raises:
        CorpusError: Another number of lines.
    """
    lines = [[word.strip() for word in line.split(",")] for line in text.splitlines() if line.strip()]
    if len(lines) != len(names):
        raise CorpusError(f"verbalizer: expected {len(names)} lines, one per label, found {len(lines)}; check the file")
    size = min(map(len, lines))
    return {name: words[:size] for name, words in zip(names, lines, strict=True)}


def fingerprint(words: Mapping[str, Sequence[str]]) -> str:
    """sha256 over labels, in their order, and their words, in any order: sums do not depend on it."""
    plain = {name: sorted(each) for name, each in words.items()}
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def read_verbalizer(metadata: Mapping[str, Any]) -> list[list[str]]:
    """Words per label of a task: `words` of its metadata, or the file that `verbalizer` names.

    Raises:
        CorpusError: The file is missing, has another form, or other words.
    """
    if "words" in metadata:
        return [list(words) for words in metadata["words"]]
    name = str(metadata["verbalizer"])
    path = rows.local_file(f"verbalizers/{name}.json")
    if path is None:
        raise CorpusError(
            f"verbalizer {name}: expected MEMDEC_DATA/verbalizers/{name}.json, found no such file; run `memdec data fetch "
            "--task verbalizers`"
        )
    words = read_words(path)
    found = fingerprint(words)
    if found != SHA256[name]:
        raise CorpusError(
            f"{path}: expected the words with sha256 {SHA256[name][:16]}, found {found[:16]} "
            f"({', '.join(f'{label} {len(each)}' for label, each in words.items())}); get the list again"
        )
    return list(words.values())


def read_words(path: Path) -> dict[str, list[str]]:
    """Words by label of a file of ours.

    Raises:
        CorpusError: It has another form.
    """
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
        return {str(label["name"]): [str(word) for word in label["words"]] for label in labels}
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f'{path}: expected {{"labels": [{{"name": ..., "words": [...]}}]}}, found {error!r}; get the list again'
        ) from None
