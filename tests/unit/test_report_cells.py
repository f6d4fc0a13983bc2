"""What the page on performance says of kind `cells`: ratios and goals, from rows made by hand."""

import pytest

from benchmarks import report_cells


def row(index: str, nprobe: int, speed: float, tv: float, distances: str = "exact") -> dict[str, str]:
    numbers = {"nprobe": nprobe, "queries_per_s": speed, "tv_tau_1": tv, "tv_tau_16": 0, "recall_1024": 1}
    numbers |= {"rows_per_s": speed / 2 if distances == "exact" else "", "speed_to_released": 0.5}
    plain = {"model": "m", "index": index, "distances": distances, "bytes_per_token": 2, "keys": 1000, "machine": "x"}
    return {name: str(value) for name, value in (plain | numbers).items()}


def lines(fast: float, tv: float, flat: float) -> str:
    rows = [row("cells 64", 8, fast, tv), row("cells 64", 32, 500, 0.001)]
    rows += [row("ivfflat 64", n, flat, tv, "of the index") for n in (8, 32)]
    rows += [row("ivfpq 4096/64", 32, 100, 0.02), row("ivfpq 4096/64", 8, 1, 0.5)]
    return "\n".join(report_cells.against_faiss(rows))


@pytest.mark.parametrize(
    ("fast", "tv", "flat", "says"),
    [
        (900, 0.01, 250, "`cells` with 8 is 9.00 times as fast at TV 0.0100. The goal is 4 times: met"),
        (900, 0.011, 250, "`cells` with 32 is 5.00 times as fast at TV 0.0010. The goal is 4 times: met"),
        (390, 0.01, 250, "`cells` with 32 is 5.00 times"),
        (900, 0.01, 250, "whole runs of `memdec targets`: 9.00 times as fast. The goal is 3 times: met"),
        (900, 0.01, 250, "nprobe: 3.60 (8), 2.00 (32) times as fast. The goal is 2 times: met"),
        (900, 0.01, 251, "nprobe: 3.59 (8), 1.99 (32) times as fast. The goal is 2 times: missed"),
        (900, 0.01, 500, "which IVFFlat has not: 3.60 (8), 2.00 (32) times as fast. The goal is 2 times: met"),
    ],
)
def test_ratios_are_at_half_the_total_variation_or_less(fast: float, tv: float, flat: float, says: str) -> None:
    assert says in lines(fast, tv, flat)


def test_no_nprobe_may_be_good_enough() -> None:
    rows = [
        row("cells 64", 8, 900, 0.02),
        row("ivfflat 64", 8, 9, 0, "of the index"),
        row("ivfpq 4096/64", 32, 1, 0.02),
    ]
    assert "no nprobe of `cells` has half its TV" in "\n".join(report_cells.against_faiss(rows))


@pytest.mark.parametrize(("power", "peak", "verdict"), [(0.5, 599, "met"), (0.6, 600, "missed")])
def test_growth_is_the_slope_of_logarithms(power: float, peak: float, verdict: str) -> None:
    rows = [
        {"width": "64", "n": str(n), "us_per_row": str(3 * n**power), "peak_mb": str(peak if n > 1000 else 1)}
        | dict.fromkeys(("cells", "nprobe", "us_per_row_exact", "us_per_key", "keys_mb", "machine"), "1")
        | {f"{what}_{kind}": str(4 * n**power) for what in ("us_per_row", "tv") for kind in ("ivfflat", "ivfpq")}
        | {"tv": "0.1"}
        for n in (1000, 4000, 16000)
    ]
    text = "\n".join(report_cells.growth(rows))
    assert f"1,000 to 16,000 keys: time per row grows as N^{power:.2f}. The goal is at most N^0.55: {verdict}" in text
    assert "Not measured: 3,000,000 keys of width 64." in text
    assert "1.3 to 1.3 times as fast as IVFPQ with as many cells." in text
    assert f"at most {peak} MB. The goal is less than 600 MB: {verdict}" in text
