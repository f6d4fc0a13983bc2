"""`benchmarks/growth.py`: the exponent, a measurement at toy size, and the figures that are published."""

import csv
from pathlib import Path

import pytest

from benchmarks import growth

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "results" / "reference" / "growth.csv"
FREE = "index, fixed cells per key"  # k-means and the cell of a key cost keys times cells


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_is_that_of_a_power(power: float) -> None:
    sizes = [3.0, 12.0, 48.0]
    assert growth.exponent(sizes, [7 * n**power for n in sizes]) == pytest.approx(power)


def test_a_measurement_gives_the_size_and_what_was_spent(tmp_path: Path) -> None:
    n, seconds, grown = growth.measure("score store", tmp_path, 300, 2)
    assert n == 300
    assert seconds > 0
    assert grown >= 0
    assert list(tmp_path.iterdir()) == []


def published() -> list[dict[str, str]]:
    with PUBLISHED.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_stage_is_published_with_the_exponent_of_its_own_figures() -> None:
    rows = published()
    assert [row["stage"] for row in rows] == [stage.name for stage in growth.STAGES]
    for row in rows:
        sizes, seconds = ([float(row[f"{what}_{times}"]) for times in growth.TIMES] for what in ("n", "cpu_s"))
        assert f"{growth.exponent(sizes, seconds):.2f}" == row["exponent"]


def test_no_stage_grows_faster_than_its_input() -> None:
    steep = {row["stage"] for row in published() if float(row["exponent"]) > growth.LIMIT}
    assert steep <= {FREE}
