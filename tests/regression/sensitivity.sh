#!/usr/bin/env bash
# Shows that the check sees what it should: three wrong versions of the reduced run, each of which must be reported.
# Needs a finished reduced run in FOLDER (tests/regression/run.sh FOLDER); upstream artefacts are reused.
set -euo pipefail
folder=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/../.." && pwd)
failed=0

expect_moved() { # NAME TABLE
  set +e
  memdec check --baseline "$root/tests/regression/reduced.json" "$2" > "$2.check"
  code=$?
  set -e
  echo "$1: exit $code, $(grep -c MOVED "$2.check" || true) cells moved (expected exit 1)"
  grep MemDec "$2.check" || true
  [ "$code" = 1 ] || failed=1
}

build() { # FOLDER CONFIG
  echo "$2" > "$1/change.yaml"
  "$root/workflow/repair.sh" "$1" --quiet --workflow-profile "$root/profiles/default" \
    --configfile "$root/tests/regression/reduced.yaml" "$1/change.yaml" -- results/table3.csv
}

copy() { rm -rf "$1" && mkdir -p "$1" && cp -a "$folder/results" "$folder/.snakemake" "$1/"; }

copy "$folder/wrong-beta"
build "$folder/wrong-beta" 'memory: {kl_weight: 0}'
expect_moved "kl_weight 0 instead of 0.5" "$folder/wrong-beta/results/table3.csv"

copy "$folder/wrong-stride"
build "$folder/wrong-stride" 'stride: 128'
expect_moved "stride 128 instead of 64" "$folder/wrong-stride/results/table3.csv"

copy "$folder/wrong-self"
cd "$folder/wrong-self"
home=results/reduced/sklearn/seed0
for shard in 0 1; do
  rm -rf $home/keys/gpt2-M/targets/$((shard + 1))-of-2
  python - "$shard" "$home" << 'PY'
import sys
from pathlib import Path
import numpy as np
from memdec import knn, targets
from memdec.config import TargetSettings

shard, home = int(sys.argv[1]), Path(sys.argv[2])
drop_self = knn.drop_self
knn.drop_self = lambda sq_dist, ids, own, k: drop_self(sq_dist, ids, np.full(len(ids), -1), k)  # the fault
settings = TargetSettings(neighbours=256, temperature=0.5, top=64, shards=2)
stream = Path("results/reduced/tokens/bpe1k/sklearn")
keys = home / "keys" / "gpt2-M"
out = keys / "targets" / f"{shard + 1}-of-2"
targets.run(keys / "datastore" / "1-of-1", keys / "index", stream, out, settings, shard=shard)
PY
done
cd - > /dev/null
rm -rf "$folder/wrong-self/results/reduced/sklearn/seed0/memory/memdec"
build "$folder/wrong-self" "scale: reduced"
expect_moved "self left among the neighbours" "$folder/wrong-self/results/table3.csv"
exit $failed
