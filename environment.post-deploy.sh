#!/usr/bin/env bash
# Run by Snakemake inside the environment it makes from environment.yml.
set -euo pipefail
pip install --no-deps -e "$PWD"
