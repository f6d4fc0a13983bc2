#!/usr/bin/env bash
# The reduced run in FOLDER, compared with the committed baseline; exit code of `memdec check`.
set -euo pipefail
source "$(dirname "$0")/common.sh"
build "$1" run
memdec check --baseline "$baseline" "${tables[@]/#/$1/}"
