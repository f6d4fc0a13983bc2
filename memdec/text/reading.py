"""Text and JSON lines from files of other people: what cannot be read is named by file, line and place."""

import json
from collections.abc import Iterator
from typing import Any

from memdec.errors import CorpusError

MAX_DEPTH = 100  # levels of nesting in a JSON row; Arrow recurses over them in C++ and would crash on very many
_INT64 = range(-(2**63), 2**63)


def decoded(data: bytes, where: object) -> str:
    r"""UTF-8 bytes as text, without a byte order mark and with `\n` as the only line end.

    Raises:
        CorpusError: The bytes are not UTF-8 text, or contain a NUL, as binary files and UTF-16 do.
    """
    try:
        text = data.decode("utf-8-sig")
        at = data.find(b"\0")
        fault = "a NUL" if at >= 0 else None
    except UnicodeDecodeError as error:
        # The codec counts from behind the byte order mark.
        at = error.start + len(data) - len(error.object)
        fault = f"0x{data[at]:02x} ({error.reason})"
    if fault is not None:
        line = data.count(b"\n", 0, at) + 1
        raise CorpusError(
            f"{where}: expected UTF-8 text, found {fault} at byte {at}, line {line}; convert it, e.g. with "
            "`iconv -t utf-8`, or check the file"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_lines(text: str, where: object) -> Iterator[tuple[int, Any]]:
    """Number (from 0) and value of every line that is not empty.

    Raises:
        CorpusError: A line is not JSON, or has what a table cannot hold; the message names the row.
    """
    for number, line in enumerate(text.split("\n")):  # splitlines would also split within texts
        if line.strip():
            yield number, json_value(line, f"{where}, row {number}")


def json_value(text: str, where: str, expected: str = "a JSON object on one line") -> Any:
    """Parse JSON that a table can hold.

    Raises:
        CorpusError: It is not JSON, is nested too deeply, or has an integer beyond 64 bits or text that UTF-8 cannot
            hold.
    """
    try:
        value = json.loads(text)
        fault = unusable(value)
    except RecursionError:
        fault = f"more than {MAX_DEPTH} levels of nesting"
    except json.JSONDecodeError as error:
        fault = f"{text[:40]!r} ({error})"
    except ValueError:  # Python reads no integer of thousands of digits
        fault = "an integer beyond 64 bits"
    if fault is not None:
        raise CorpusError(f"{where}: expected {expected}, found {fault}; check the file")
    return value


def unusable(value: Any) -> str | None:
    """What a table cannot hold in a JSON value, or None."""
    level, depth = [("", value)], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            return f"more than {MAX_DEPTH} levels of nesting"
        below: list[tuple[str, Any]] = []
        for name, each in level:
            place = f" in {shown(name)}" if name else ""
            if isinstance(each, str) and (at := _surrogate(each)) is not None:
                return f"half of a surrogate pair (character {at}){place}, which UTF-8 cannot hold"
            if isinstance(each, int) and each not in _INT64:
                return f"an integer beyond 64 bits{place}"
            if isinstance(each, dict):
                if any(_surrogate(key) is not None for key in each):
                    return "half of a surrogate pair in a field's name, which UTF-8 cannot hold"
                below += [(name or key, one) for key, one in each.items()]
            elif isinstance(each, list):
                below += [(name, one) for one in each]
        level = below
    return None


def _surrogate(text: str) -> int | None:
    """Place of the first character that UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def shown(value: object, most: int = 80) -> str:
    """A value as Python writes it, on one line, cut to `most` characters and safe to print."""
    text = ascii(value) if isinstance(value, str) and _surrogate(value) is not None else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
