#!/usr/bin/env bash
# The reduced run in FOLDER, compared with the committed baseline; exit code of `memdec check`.
set -euo pipefail
folder=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$folder"
"$root/workflow/run.sh" "$folder" --quiet --cores 8 --configfile "$root/tests/regression/reduced.yaml" \
  --workflow-profile "$root/profiles/default" -- results/table3.csv
memdec check --baseline "$root/tests/regression/reduced.json" "$folder/results/table3.csv"
