"""Verbalizers: the words that represent each label. The tasks' YAML has the short ones, files have the long ones.

A file is MEMDEC_DATA/verbalizers/NAME.json: `{"labels": [{"name": ..., "words": [...]}, ...]}`. The lists are those of
knowledgeable prompt tuning (OpenPrompt). They are not part of this project; a hash checks that a copy has the same
words.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memdec.errors import CorpusError, RowsMissingError
from memdec.tasks import rows
from memdec.text import reading

# Values of `fingerprint`. The lists of sentiment and agn are cut to the shortest one first, as the protocol does.
SHA256 = {
    "sentiment": "dfc870bd088f436da9ea6a810a2d5c0e930c1734c97be253bd4064a586b50a64",
    "agn": "fd116607a43a6f8e4b97745b544eafd0650829dcc6c39f84f8a6bf7b0ded610b",
    "yahoo": "762cd1747c6ff906ac48d73b4ab423cd5bd74260c53800573a6c6bc79d9cea3a",
}


def parse_text(text: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Words by label from a `knowledgeable_verbalizer.txt`: one line per label, words separated by commas.

    Every list is cut to the length of the shortest one. The number of tokens of a word does not matter here.

    Args:
        text: Content of the file.
        names: Names of the labels, in the order of the lines.

    Raises:
        CorpusError: The number of lines is not the number of labels.
    """
    lines = [[word.strip() for word in line.split(",")] for line in text.splitlines() if line.strip()]
    if len(lines) != len(names):
        raise CorpusError(f"verbalizer: expected {len(names)} lines, one per label, found {len(lines)}; check the file")
    size = min(map(len, lines))
    return {name: words[:size] for name, words in zip(names, lines, strict=True)}


def fingerprint(words: Mapping[str, Sequence[str]]) -> str:
    """sha256 over the labels in order and their sorted words; the order of words does not matter for sums over them."""
    plain = {name: sorted(each) for name, each in words.items()}
    return hashlib.sha256(json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def read_verbalizer(metadata: Mapping[str, Any]) -> list[list[str]]:
    """The words of each label of a task: `words` in its metadata, or the file that `verbalizer` names.

    Raises:
        CorpusError: The file is missing, has another format, or has other words.
    """
    if "words" in metadata:
        return [list(words) for words in metadata["words"]]
    name = str(metadata["verbalizer"])
    path = rows.local_file(f"verbalizers/{name}.json")
    if path is None:
        raise RowsMissingError(
            f"verbalizer {name}: expected MEMDEC_DATA/verbalizers/{name}.json, found no such file; run `memdec data fetch "
            "--task verbalizers`",
            "verbalizers",
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
    """Read the words of each label from a file in our format.

    Raises:
        CorpusError: The file has another format.
    """
    try:
        labels = reading.json_value(rows.text_of(path), str(path), "a JSON object")["labels"]
        return {str(label["name"]): [str(word) for word in label["words"]] for label in labels}
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f'{path}: expected {{"labels": [{{"name": ..., "words": [...]}}]}}, found {error!r}; get the list again'
        ) from None
