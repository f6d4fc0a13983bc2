#!/usr/bin/env bash
# What one visit to a GPU should bring back, without network: bash benchmarks/gpu.sh OUT [--tiny] [PART ...]
#
#   a  tests/gpu                                                        tests.txt
#   b  hot paths against plain twins (benchmarks/gpu.py)                gpu.csv
#   c  latency at the paper's shapes, random weights                    latency.csv
#   d  Tables 1, 2 and 14 to 16 of one domain (config/gpu-run.yaml)     tables.tgz, for `python -m docs.publish`
#
# Each part has a time limit and writes its files as soon as they are there; a failed one does not stop the others.
# OUT/summary.json says how each ended, on what device and with which versions; the exit status is 1 if any part failed.
# That holds too for a part that a signal to this script ends (`timeout 300 bash benchmarks/gpu.sh ...`).
# At most 780 seconds on an H100 with 16 slow cores, by which the limits were set. --tiny: toy sizes on any device.
#
# d reads MEMDEC_TEST_DATA (corpora), MEMDEC_SMOL (folder with SmolLM2-135M) and MEMDEC_DATA (rows of the tasks).
# WORK (default build/gpu) is for everything else; there d goes on where it was stopped.
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
    [a-d]) if [[ $out ]]; then parts+=("$1"); else out=$1; fi ;;
    -*) usage ;;
    *) if [[ $out ]]; then usage; else out=$1; fi ;;
  esac
  shift
done
[[ $out ]] || usage
((${#parts[@]})) || parts=(a b c d)
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
  local configs=(config/smol.yaml config/smol-domains.yaml config/gpu-run.yaml) tables=(results/table{1,2,14,15,16}.csv)
  ((${#tiny[@]})) && configs=(config/mini.yaml config/gpu-tiny.yaml) tables=(results/table{1,2,16}.csv)
  # A lock is what a run leaves that a time limit has ended. Six jobs share the GPU: the models are small, and half of the
  # time goes into the starts of processes.
  "$python" -m snakemake --snakefile Snakefile --directory "$work/table" --nolock --keep-going --cores "$(nproc)" \
    --resources gpu=6 --configfile "${configs[@]}" -- "${tables[@]}"
}

pack_tables() {
  [[ -d $work/table/results ]] || return 0
  find "$work/table/results" -maxdepth 1 -type f -printf '%f\0' | sort -z |
    tar czf "$out/tables.tgz" -C "$work/table/results" --null --files-from -
}

case $now in
  a) part_a ;;
  b) part_b ;;
  c) part_c ;;
  d) part_d ;;
esac
[[ -z $now ]] || exit 0

# Seconds, 780 in all. Measured on an H200: a 31 and the start, d 330; on an H100 b 164 without search in cells, c 150 for
# one of two prompts with more than twice the new tokens.
declare -A limits=([a]=60 [b]=215 [c]=120 [d]=385)
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
  # Here, as a part that runs into its limit may be killed: Snakemake waits for the jobs that run.
  if [[ $part == d ]]; then pack_tables; fi
  "$python" -m benchmarks.summary "$out" "$part" "$status" "$seconds" "$limit" "$log"
done
exit "$failed"
