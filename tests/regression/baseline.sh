#!/usr/bin/env bash
# Makes tests/regression/reduced.json anew: baseline.sh FOLDER REASON. The tolerance comes from seeds 1 and 2 (everything
# after the base models) and from a run with other vector instructions, which rounds as another processor would.
set -euo pipefail
source "$(dirname "$0")/common.sh"
mkdir -p "$1"
folder=$(cd "$1" && pwd)
noise=()

keep() { # FOLDER NAME: its tables are a measurement of the noise
  local table
  mkdir -p "$folder/$2"
  for table in "${tables[@]%.csv}"; do
    cp "$1/$table".{csv,cells.csv,provenance.json} "$folder/$2/"
    noise+=(--noise "$folder/$2/$(basename "$table").csv")
  done
}

for seed in 1 2; do
  echo "seeds: [$seed]" > "$folder/seed.yaml"
  build "$folder" run "$folder/seed.yaml" && keep "$folder" "seed$seed"
done
ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 build "$folder/avx2" run
keep "$folder/avx2" avx2-seed0
build "$folder" run
memdec check --update --reason "$2" --baseline "$baseline" "${noise[@]}" "${tables[@]/#/$folder/}"
