"""The errors that a user can act on, as one small class tree under `MemDecError`.

Every message names what was expected, what was found, where, and the next step. The command line prints it as one
line and exits with `exit_code`. These errors report bad input or a lack of resources, never a bug in this package.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class MemDecError(Exception):
    """Base of all errors that the user can act on; its message is one line, whatever names and values are in it."""

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(on_one_line(str(message)))


class ConfigError(MemDecError):
    """A configuration or option that does not fit the typed settings."""


class ArtifactError(MemDecError):
    """An artefact folder that is missing, half-written, or does not fit the artefact it is used with."""


class CorpusError(MemDecError):
    """A corpus that is empty, unreadable, too small, or lacks the requested field."""


class RowsMissingError(CorpusError):
    """Rows of a task that are neither under MEMDEC_DATA nor on the Hub; `task` is their folder in `memdec data fetch`."""

    def __init__(self, message: object = "", task: str = "") -> None:
        super().__init__(message)
        self.task = task


class ModelError(MemDecError):
    """A model or tokenizer that is missing, unsupported, or does not fit the other models."""


class NumericsError(MemDecError):
    """NaN or infinite values where finite values are needed."""


class ResourceError(MemDecError):
    """Too little disk space or memory for a stage, or a system that does not open a file."""


class IncomparableError(MemDecError):
    """Two results that must not be compared, because their text or versions differ."""

    exit_code = 3


def on_one_line(text: str) -> str:
    """Text without line ends; control and direction characters are written as their escapes."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in " ".join(text.split()))


def reason(error: BaseException, most: int = 200) -> str:
    """The message of an error on one line, cut to `most` characters."""
    return " ".join((str(error) or repr(error)).split())[:most]


@contextmanager
def outside(kind: type[MemDecError], where: object, expected: str, instead: str) -> Iterator[None]:
    """Replace any error of another library by a one-line error of type `kind`.

    It catches every exception, because the Hub client alone raises a dozen unrelated types.

    Args:
        kind: Error class to raise.
        where: File, folder or name that is read.
        expected: What should be there.
        instead: The next step for the user.
    """
    try:
        yield
    except MemDecError:
        raise
    except Exception as error:
        raise kind(f"{where}: expected {expected}, found: {reason(error)}; {instead}") from None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Within the `lm_eval` executable, print a `MemDecError` as one line and exit with its code, as `memdec` does."""
    try:
        yield
    except MemDecError as error:
        program = Path(sys.argv[0])
        if not {program.stem, program.parent.name} & {"lm_eval", "lm-eval"}:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
