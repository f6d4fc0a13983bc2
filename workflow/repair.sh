#!/usr/bin/env bash
# Makes again what a finished table has lost: repair.sh FOLDER [SNAKEMAKE OPTIONS] -- TABLE ..., where FOLDER has `results`.
#
# `memdec doctor` takes the manifests of cut artefacts away. Snakemake does not look at a missing file when all that is
# made from it is there, but its summary names the file; with --forcerun it is made again, and so is what depends on it.
set -euo pipefail
folder=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
run=(snakemake --snakefile "$root/Snakefile" --directory "$folder")

memdec doctor "$folder/results" || [[ $? == 1 ]]
# A summary that fails does so without a word; a dry run says why.
summary=$("${run[@]}" --summary --quiet host "$@") || { "${run[@]}" --dry-run "$@" || exit; exit 1; }
mapfile -t missing < <(awk -F '\t' '$5 == "missing" { print $1 }' <<< "$summary")
again=()
((${#missing[@]})) && again+=(--forcerun "${missing[@]}")
"$root/workflow/run.sh" "$folder" "${again[@]}" --rerun-incomplete "$@"
