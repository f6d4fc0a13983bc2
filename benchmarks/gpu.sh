#!/usr/bin/env bash
# What one visit to a GPU should bring back, without network: bash benchmarks/gpu.sh OUT [--tiny] [PART ...]
#
#   a  tests/gpu                                                        tests.txt
#   b  hot paths against plain twins (benchmarks/gpu.py)                gpu.csv
#   c  latency at the paper's shapes, random weights                    latency.csv
#   d  Table 1 of one domain: config/smol.yaml and gpu-run.yaml         table1.csv, table1.md
#   e  nine DCPMI and thirteen domain tasks, with the models of d       tasks.csv
#
# Each part has a time limit and writes its files as soon as they are there; a failed one does not stop the others.
# OUT/summary.json says how each ended, on what device and with which versions; the exit status is 1 if any part failed.
# That holds too for a part that a signal to this script ends (`timeout 300 bash benchmarks/gpu.sh ...`).
# At most 780 seconds on an H100 with 16 slow cores, by which the limits were set. --tiny: toy sizes on any device.
#
# d reads MEMDEC_TEST_DATA (corpora) and MEMDEC_SMOL (folder with SmolLM2-135M), e MEMDEC_DATA (rows of the tasks).
# WORK (default build/gpu) is for everything else; e finds there what an earlier call of d made.
set -euo pipefail

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2; }

self=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
root=$(dirname "$(dirname "$self")")
python=${PYTHON:-python3}

out='' tiny=() parts=() now=''
while (($#)); do
  case $1 in
    --tiny) tiny=(--tiny) ;;
    --now) now=$2; shift ;; # this part, in this very process: how the script calls itself
    [a-e]) if [[ $out ]]; then parts+=("$1"); else out=$1; fi ;;
    -*) usage ;;
    *) if [[ $out ]]; then usage; else out=$1; fi ;;
  esac
  shift
done
[[ $out ]] || usage
((${#parts[@]})) || parts=(a b c d e)
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=${WORK:-$root/build/gpu}/${tiny:+tiny}
mkdir -p "$work"
work=$(cd "$work" && pwd)
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

part_a() { "$python" -m pytest tests/gpu -vv -rs --color=no --no-header | tee "$out/tests.txt"; }

part_b() { "$python" -m benchmarks.gpu "${tiny[@]}" --out "$out/gpu.csv"; }

part_c() {
  rm -rf "$work/shapes"
  "$python" -m benchmarks.shapes "$work/shapes" "${tiny[@]}"
  "$python" -m benchmarks.latency "$work/shapes" "${tiny[@]}" --out "$out/latency.csv"
  rm -rf "$work/shapes" # 4 GB
}

part_d() {
  local configs=(config/smol.yaml config/smol-domains.yaml config/gpu-run.yaml) file
  ((${#tiny[@]})) && configs=(config/mini.yaml config/gpu-tiny.yaml)
  # A lock is what a run leaves that a time limit has ended. Three jobs share the GPU: the models are small, and half of
  # the time goes into the starts of processes.
  "$python" -m snakemake --snakefile Snakefile --directory "$work/table" --nolock --cores "$(nproc)" --resources gpu=3 \
    --configfile "${configs[@]}" -- results/table1.csv
  for file in table1.csv table1.md; do cp "$work/table/results/$file" "$out/"; done
}

part_e() {
  local found=("$work"/table/results/*/config.json)
  "$python" -m benchmarks.tasks "$(dirname "${found[0]}")" "${tiny[@]}" --out "$out/tasks.csv"
}

case $now in
  a) part_a ;;
  b) part_b ;;
  c) part_c ;;
  d) part_d ;;
  e) part_e ;;
esac
[[ -z $now ]] || exit 0

# Seconds, 780 in all. Measured: a over 60 (a third of it imports), b 164, c 150 for one of two prompts with more than twice
# the new tokens, d 246, e 105 for all but LoRA.
declare -A limits=([a]=90 [b]=175 [c]=120 [d]=265 [e]=130)
"$python" -m benchmarks.summary "$out" start "${tiny[@]}" "${parts[@]}"
failed=0 running='' stopped=''
# `timeout` passes the signal on to its part, and the loop writes how that part ended.
trap 'stopped=1; [[ -z $running ]] || kill -TERM "$running" 2>/dev/null || true' TERM INT HUP
for part in "${parts[@]}"; do
  [[ -z $stopped ]] || break
  limit=${limits[$part]} log=$work/$part.log status=0
  ((${#tiny[@]})) && limit=1200
  echo "== part $part, at most $limit s"
  begin=$(date +%s.%N)
  timeout --kill-after=10 "$limit" bash "$self" "$out" "${tiny[@]}" --now "$part" >"$log" 2>&1 </dev/null &
  running=$!
  wait "$running" || status=$?
  # A signal ends `wait`, not the part.
  while kill -0 "$running" 2>/dev/null; do wait "$running" || true; done
  running=''
  seconds=$("$python" -c 'import sys, time; print(time.time() - float(sys.argv[1]))' "$begin")
  tail -n 12 "$log"
  ((status == 0)) || failed=1
  echo "== part $part: exit status $status after ${seconds%.*} s"
  "$python" -m benchmarks.summary "$out" "$part" "$status" "$seconds" "$limit" "$log"
done
exit "$failed"
