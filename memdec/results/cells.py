"""`<table>.cells.csv`: one line for each cell of a table, with all that is known about it. Programs read this file.

`Cell` is the definition of the columns; `memdec schema --of cells` writes it as JSON schema, and docs/tables.md explains
it.
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from memdec.artefacts import artefact
from memdec.errors import ArtifactError, outside
from memdec.settings import describe

Verdict = Literal["match", "near", "off", "better", "not run"]


def _labels(value: object) -> object:
    """Counts of labels, which are JSON in the file."""
    return json.loads(value) if isinstance(value, str) else value


class Cell(BaseModel):
    """One cell of a table. A field that does not apply is empty; a cell without a value says why in `note`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    table: str = Field(description="name of the table, as in its file name")
    study: str | None = Field(None, description="study of the config that fills the table")
    row: str = Field(description="labels of the row, joined with ' / '")
    family: str | None = Field(None, description="family of the base model")
    model: str | None = Field(None, description="base model, a name of the config")
    method: str | None = Field(None, description="compared system: base, In-Context RAG, kNN-LM, DAPT, LoRA or MemDec")
    memory: str | None = Field(None, description="memory, a name of the config")
    column: str = Field(description="heading of the column")
    domain: str | None = Field(None, description="corpus that the system was made for")
    task: str | None = Field(None, description="lm-eval task; empty for perplexities")
    metric: str | None = Field(None, description="metric, as the records call it")
    unit: str | None = Field(None, description="unit of value, low, high, sd and paper")
    lower_is_better: bool | None = Field(None, description="whether a lower value is better; empty if neither is")
    value: float | None = Field(None, description="the number: the mean over seeds")
    low: float | None = Field(None, description="lower end of the 95 % interval over items; the mean over seeds")
    high: float | None = Field(None, description="upper end of that interval")
    n: int | None = Field(None, description="scored tokens (perplexity) or rows (tasks) of each seed")
    seeds: int | None = Field(None, description="number of seeds")
    sd: float | None = Field(None, description="standard deviation over seeds; empty with one seed")
    alpha: str | None = Field(None, description="weight of the memory; several if seeds differ, with a space between")
    lambda_: str | None = Field(None, alias="lambda", description="weight of p_kNN, in the same form")
    temperature: str | None = Field(None, description="tau of p_kNN where it was tuned, in the same form")
    learning_rate: str | None = Field(None, description="learning rate where it was tuned, in the same form")
    p_base: float | None = Field(None, ge=0, le=1, description="p-value of the paired test against the base alone")
    best_other: str | None = Field(None, description="row with the best other value in the group of rows")
    p_best: float | None = Field(None, ge=0, le=1, description="p-value of the paired test against that row")
    labels: Annotated[dict[str, int] | None, BeforeValidator(_labels)] = Field(
        None, description="classification: how often each label was predicted, over all seeds, as JSON"
    )
    constant: bool | None = Field(None, description="classification: whether one label was predicted for all rows")
    paper: float | None = Field(None, description="the number that the paper prints for this cell")
    verdict: Verdict | None = Field(None, description="value compared with paper, at the scale of the paper")
    note: str = Field("", description="why there is no value, or what to know about it")

    @model_validator(mode="after")
    def _has_a_value_or_a_reason(self) -> Self:
        if self.value is None and not self.note:
            raise ValueError("note: expected the reason why the cell has no value, found none")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low: expected at most high ({self.high:g}), found {self.low:g}")
        return self

    @property
    def place(self) -> tuple[str, str, str]:
        """Table, row and column, which no other cell has."""
        return self.table, self.row, self.column


COLUMNS = tuple(field.alias or name for name, field in Cell.model_fields.items())


def write(path: Path, cells: Sequence[Cell]) -> None:
    """Write cells as CSV.

    Raises:
        ArtifactError: Two cells have one place.
    """
    _check_once(path, cells)
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    lines.writerows([_text(value) for value in cell.model_dump(by_alias=True).values()] for cell in cells)
    artefact.write_text(path, text.getvalue())


def read(path: Path) -> list[Cell]:
    """Read cells.

    Raises:
        ArtifactError: The file is not there, lacks a column, or has a line that is no cell, such as one with NaN or
            with the place of an earlier one.
    """
    with outside(ArtifactError, path, "cells of a table", "make the table again"):
        header, *lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8")))) or [[]]
    if missing := [name for name in COLUMNS if name not in header]:
        raise ArtifactError(
            f"{path}: expected the columns {', '.join(COLUMNS)}, found no {', '.join(missing)}; make the table again"
        )
    cells = []
    for number, line in enumerate(lines, 2):
        given = {name: value for name, value in zip(header, line, strict=False) if value != ""}
        try:
            cells.append(Cell.model_validate(given))
        except (ValidationError, ValueError) as error:
            said = describe(error, Cell) if isinstance(error, ValidationError) else str(error)
            raise ArtifactError(f"{path}, line {number}: expected a cell, found {said}; make the table again") from None
    _check_once(path, cells)
    return cells


def json_schema() -> dict[str, Any]:
    """JSON schema of a line of the file, for programs that read it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Cell.model_json_schema()}


def _check_once(path: Path, cells: Iterable[Cell]) -> None:
    places = set()
    for cell in cells:
        if cell.place in places:
            raise ArtifactError(
                f"{path}: expected one cell in a place, found two in row {cell.row}, column {cell.column}; "
                "make the table again"
            )
        places.add(cell.place)


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False, sort_keys=True) if isinstance(value, dict) else str(value)
