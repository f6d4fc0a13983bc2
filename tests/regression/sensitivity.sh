#!/usr/bin/env bash
# Shows that the check sees what it should: six wrong versions of the reduced run, each of which must be reported, and the
# right one, which must not. Needs a finished reduced run in FOLDER (tests/regression/run.sh FOLDER); what a fault does not
# touch is reused. A fault of the code is a patch of tests/mutants on a copy of the package. sensitivity.sh FOLDER NAME ...:
# only these.
set -euo pipefail
source "$(dirname "$0")/common.sh"
folder=$(cd "$1" && pwd)
only=" ${*:2} "
seed=results/reduced/sklearn/seed0
failed=0

wanted() { [[ $only == "  " || $only == *" $1 "* ]]; }

expect() { # EXIT FOLDER NAME
  local code=0
  memdec check --baseline "$baseline" "${tables[@]/#/$2/}" > "$2/check.txt" || code=$?
  echo "$3: exit $code, $(grep -c '^MOVED' "$2/check.txt" || true) cells moved (expected exit $1)"
  grep '^MOVED' "$2/check.txt" || true
  [ "$code" = "$1" ] || failed=1
}

copy() { rm -rf "$1" && mkdir -p "$1" && cp -a "$folder/results" "$folder/rows" "$folder/.snakemake" "$1/"; }

with_setting() { # NAME TITLE YAML
  wanted "$1" || return 0
  local where=$folder/wrong-$1
  copy "$where"
  echo "$3" > "$where/change.yaml"
  build "$where" repair "$where/change.yaml"
  expect 1 "$where" "$2"
}

with_fault() { # PATCH TITLE ARTEFACT ...: the artefacts are those that the fault spoils first
  wanted "$1" || return 0
  local where=$folder/wrong-$1 artefact
  copy "$where"
  mkdir "$where/code"
  cp -a "$root/memdec" "$root/harness_tasks" "$where/code/"
  (cd "$where/code" && GIT_CEILING_DIRECTORIES=$where git apply --recount -C1 "$root/tests/mutants/$1.patch")
  for artefact in "${@:3}"; do rm -r "$where/$artefact"; done
  PYTHONPATH=$where/code build "$where" repair
  expect 1 "$where" "$2"
}

expect 0 "$folder" "as it should be"
with_setting beta "kl_weight 0 instead of 0.5" 'memory: {kl_weight: 0}'
with_setting alpha "alpha 0.6 instead of 0.8, in the tasks 0.8 instead of 0.6" \
  '{evaluate: {alphas: [0.6]}, suites: {regression: {alpha: 0.8}}}'
with_fault stride-ignored "each window scores 128 tokens instead of 64" "$seed"/evaluation
with_fault self-is-a-neighbour "the position itself is among the neighbours" \
  "$seed"/keys/gpt2-M/targets "$seed"/memory/memdec
with_fault premise-ignored "the premise is forgotten in DCPMI" \
  results/reduced/harness/regression/gpt2-S "$seed"/harness/regression/memdec/gpt2-S
with_fault normalised-by-letters "log-likelihood per letter instead of per token in a domain task" \
  results/reduced/harness/regression/gpt2-S "$seed"/harness/regression/memdec/gpt2-S
exit "$failed"
