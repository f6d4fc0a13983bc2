"""Latency at the paper's shapes: `python -m benchmarks.latency SHAPES [--tiny] [--out results/gpu/latency.csv]`.

SHAPES is the folder that `benchmarks.shapes` wrote. Stage `latency` measures base, MemDec and speculative decoding in
bfloat16, with 48 new tokens after prompts of 128 and 1,024 tokens. One file has all results, each ratio to the base
beside that of the paper's Figure 4; it is written after each prompt length. The weights are random, so the acceptance of drafts means nothing: models with tied
weights repeat the last token, and then nearly all drafts are accepted. The file has the acceptance.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd

from memdec.artefacts import artefact, devices
from memdec.inference.systems import Parts
from memdec.results import latency
from memdec.settings import Compute, LatencySettings

ALPHA = 0.6
PROMPTS = (128, 1024)  # tokens
# Figure 4 of the paper (arXiv v1, v2 and camera-ready): biomedical text, Qwen2.5-1.5B with a memory of 0.5B. The paper
# does not say whether prompts count, and gives no lengths, hardware or batch size.
PAPER = {"base": 1.0, "MemDec": 1.28}


def main() -> None:
    """Measure and write the CSV after each prompt length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", type=Path)
    parser.add_argument("--tiny", action="store_true", help="short prompts and texts")
    parser.add_argument("--out", type=Path, default=Path("results/gpu/latency.csv"))
    args = parser.parse_args()
    new_tokens, prompts = (24, (16, 64)) if args.tiny else (48, PROMPTS)
    repeats = 2 if args.tiny else 3
    tables = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = LatencySettings(new_tokens=[new_tokens], repeats=repeats, warmup=1)
    compute = Compute(precision="bfloat16")
    base, memory = args.shapes / "base", args.shapes / "memory"
    device = str(devices.pick(compute))
    parts = Parts(base=base, memory=memory, alpha=ALPHA, dtype=devices.precision(compute), device=device)
    systems = latency.systems(parts, settings)
    for prompt in prompts:
        with tempfile.TemporaryDirectory() as scratch:
            now = settings.model_copy(update={"prompt_tokens": prompt})
            inputs = {"weights": "random", "alpha": repr(ALPHA)}
            latency.run(systems, Path(scratch) / "latency", now, inputs=inputs, compute=compute)
            tables.append(pd.read_csv(Path(scratch) / "latency" / "latency.csv"))
        table = pd.concat(tables)
        table.insert(table.columns.get_loc("ratio_high") + 1, "paper_ratio", table["system"].map(PAPER))
        artefact.write_text(args.out, table.to_csv(index=False, lineterminator="\n"))
        print(table[table["prompt_tokens"] == prompt].to_string(), flush=True)


if __name__ == "__main__":
    main()
