"""What can go wrong because of the input, as one small tree under `MemDecError`.

Every message names what was expected, what was found, where, and the next step. The command line prints it as one
line and exits with `exit_code`; nothing here is ever raised for a bug of ours.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class MemDecError(Exception):
    """Base of all errors that the user can act on."""

    exit_code = 2


class ConfigError(MemDecError):
    """A configuration or option that does not fit the typed settings."""


class ArtifactError(MemDecError):
    """An artefact folder that is missing, half-written, or does not fit the one it is used with."""


class CorpusError(MemDecError):
    """A corpus that is empty, unreadable, too small, or lacks the field asked for."""


class ModelError(MemDecError):
    """A model or tokenizer that is missing, unsupported, or does not fit its partner."""


class NumericsError(MemDecError):
    """NaN or infinite values where finite ones are needed."""


class ResourceError(MemDecError):
    """Too little disk or memory for what is to be made."""


class IncomparableError(MemDecError):
    """Two results that must not be compared (other text, other versions)."""

    exit_code = 3


def reason(error: BaseException, most: int = 200) -> str:
    """What an error says, on one line and not too long."""
    return " ".join((str(error) or repr(error)).split())[:most]


@contextmanager
def outside(kind: type[MemDecError], where: object, expected: str, instead: str) -> Iterator[None]:
    """Turn whatever another library raises into one line of ours: the Hub client alone raises a dozen unrelated types.

    Args:
        kind: Error to raise.
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
    """Inside the `lm_eval` executable an error the user can act on is one line and exit code 2, as in `memdec`."""
    try:
        yield
    except MemDecError as error:
        program = Path(sys.argv[0])
        if not {program.stem, program.parent.name} & {"lm_eval", "lm-eval"}:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
