"""Downloading and parsing rows and word lists from files of public GitHub repositories at a fixed commit.

A parser takes the text of a file and returns rows with the fields that the tasks read. The field `row` is the number of
the line or record in that file, counted from 0 without the header.
"""

import csv
import http.client
import io
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memdec.errors import CorpusError
from memdec.tasks import verbalizers

RAW = "https://raw.githubusercontent.com"
TRIES = 3
TIMEOUT_S = 60
PAUSE_S = 2.0
_SST = re.compile(r"__label__([1-5])\t(.+)")
_SST_NEUTRAL = 3  # the neutral class; SST2 is SST without it

Row = dict[str, Any]
Parser = Callable[[str], list[Row]]


@dataclass(frozen=True, slots=True)
class GitHubFile:
    """A file of a public repository: owner/name, full commit hash, path, and the parser of its text."""

    repository: str
    revision: str
    path: str
    parse: Parser

    @property
    def name(self) -> str:
        """Repository and path."""
        return f"github.com/{self.repository} {self.path}"

    def __str__(self) -> str:
        return f"{self.name} at {self.revision}"


def github_rows(file: GitHubFile) -> list[Row]:
    """Download and parse a file on GitHub.

    Raises:
        CorpusError: The file cannot be downloaded completely, or has another format.
    """
    data = _download(file)
    try:
        return file.parse(data.decode("utf-8"))
    except (ValueError, AttributeError, RecursionError, csv.Error, CorpusError) as error:
        raise CorpusError(
            f"{file}: expected the known format of this file, found: {_short(error)}; put the file under "
            "MEMDEC_DATA by hand"
        ) from None


def _download(file: GitHubFile) -> bytes:
    url = f"{RAW}/{file.repository}/{file.revision}/{urllib.parse.quote(file.path)}"
    tries = 0
    while True:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                data: bytes = answer.read()  # raises IncompleteRead if it is shorter than announced
            return data
        except (OSError, http.client.HTTPException) as error:
            tries += 1
            gone = isinstance(error, urllib.error.HTTPError) and error.code in (404, 410)
            if gone or tries == TRIES:
                raise CorpusError(
                    f"{file}: expected the file from GitHub, found: {_short(error)}; put it under MEMDEC_DATA by hand, or check "
                    "the network"
                ) from None
        time.sleep(PAUSE_S)


def _short(error: Exception) -> str:
    return " ".join((str(error) or repr(error)).split())[:160]


def sst_lines(text: str) -> list[Row]:
    """Parse lines of `__label__N`, a tab and a sentence; the neutral class 3 is left out."""
    found = []
    for number, line in enumerate(_lines(text)):
        match = _SST.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number}: {line[:40]!r}")
        if int(match[1]) != _SST_NEUTRAL:
            found.append({"row": number, "label": int(match[1]), "text": match[2]})
    return found


def csv_records(text: str) -> list[Row]:
    """Parse CSV with a header."""
    return _numbered(list(csv.DictReader(io.StringIO(text, newline=""), strict=True)))


def json_lines(text: str) -> list[Row]:
    """Parse one JSON object per line."""
    return _numbered([json.loads(line) for line in _lines(text)])


def word_lines(*names: str) -> Parser:
    """Make a parser of word lists, one line per label in the order of `names`; all are cut to the shortest list."""
    return lambda text: _labels(verbalizers.parse_text(text, names))


def word_object(text: str) -> list[Row]:
    """Parse a JSON object with the words of each label; the lists are not cut."""
    return _labels(json.loads(text))


def _lines(text: str) -> list[str]:
    lines = [line.removesuffix("\r") for line in text.split("\n")]  # splitlines would also split within texts
    return lines if lines[-1] else lines[:-1]


def _numbered(records: list[Row]) -> list[Row]:
    """Add the row number to records, turn numeric labels into int, and drop a field without a name (pandas' index)."""
    found = []
    for number, record in enumerate(records):
        row = {"row": number} | {name: value for name, value in record.items() if name}
        for name in ("label", "Class Index"):
            if isinstance(value := row.get(name), str) and value.isdecimal():
                row[name] = int(value)
        found.append(row)
    return found


def _labels(words: dict[str, list[str]]) -> list[Row]:
    return [{"name": name, "words": list(each)} for name, each in words.items()]
