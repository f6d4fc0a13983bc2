"""How fast a machine does the work of the stages, and the memory it has; `memdec plan --measure` fills it in."""

import itertools
import json
import math
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from memdec.artefacts import sources
from memdec.errors import ConfigError
from memdec.settings import Settings, parse

DEFAULT = Path(__file__).with_name("rates.json")
ByWidth = Annotated[dict[PositiveInt, PositiveFloat], Field(min_length=1)]


class Rates(Settings):
    """Rates of one processor core, or of one GPU with the process that drives it."""

    device: str = Field(description="what was measured, in words")
    source: str = Field(description="where the numbers come from")
    start: PositiveFloat = Field(
        description="seconds from the start of a process until its models are loaded, if small"
    )
    light: PositiveFloat = Field(description="seconds of a whole process that only calculates on scores or tables")
    train: ByWidth = Field(description="FLOP/s of training steps, by the width of the model")
    score: ByWidth = Field(
        description="FLOP/s of forward passes that give log-probabilities, by the width of the model"
    )
    search: ByWidth = Field(
        description="FLOP/s of a search among keys, with the selection of k, by the width of the keys"
    )
    gather: PositiveFloat = Field(description="neighbours per second that are summed into rows of p_kNN")
    text: PositiveFloat = Field(description="bytes of text per second that are tokenized")
    process: PositiveFloat = Field(description="bytes of main memory of a process before it has loaded anything")
    memory: PositiveFloat = Field(description="bytes of memory: of the GPU, or for processors of the machine")

    def at(self, work: str, width: int) -> float:
        """Rate of `train`, `score` or `search` at a width, on a line in the logarithms between the measured ones."""
        known = sorted(getattr(self, work).items())
        if width <= known[0][0]:
            return float(known[0][1])
        for (low, slower), (high, faster) in itertools.pairwise(known):
            if width <= high:
                part = math.log(width / low) / math.log(high / low)
                return float(slower * (faster / slower) ** part)
        return float(known[-1][1])


class Machine(Settings):
    """Rates of the processors and, where it has one, of the GPU of a machine."""

    cpu: Rates
    gpu: Rates | None = None

    def on(self, gpu: bool) -> Rates:
        """The rates of jobs on a GPU, or on processors."""
        return self.gpu if gpu and self.gpu is not None else self.cpu


def measured() -> Path:
    """The file of this machine's rates, which `memdec plan --measure` writes."""
    return sources.cache() / "rates.json"


def load(path: Path | None = None) -> Machine:
    """Rates in a file; by default those measured on this machine, or the published ones, which also stand in for a GPU.

    Raises:
        ConfigError: The file is not there or has other fields.
    """
    file = path or (measured() if measured().is_file() else DEFAULT)
    found = _read(file)
    return found if found.gpu is not None else found.model_copy(update={"gpu": _read(DEFAULT).gpu})


def _read(file: Path) -> Machine:
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file}: expected rates as JSON, found {type(error).__name__}; make them with memdec plan --measure"
        ) from None
    found: Machine = parse(Machine, data, str(file))
    return found
