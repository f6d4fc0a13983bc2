# What run.sh, baseline.sh and sensitivity.sh share.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
baseline=$root/tests/regression/reduced.json
tables=(results/table3.csv results/table2.csv results/table14.csv results/rivals.csv)

build() { # FOLDER run|repair [CONFIG]: the tables of the reduced run, with CONFIG laid over it
  mkdir -p "$1"
  python "$root/tests/regression/rows.py" "$1/rows"
  MEMDEC_DATA=$(cd "$1/rows" && pwd) "$root/workflow/$2.sh" "$1" --quiet --cores "${CORES:-8}" \
    --workflow-profile "$root/profiles/default" \
    --configfile "$root"/tests/regression/{reduced,tasks,rivals}.yaml "${@:3}" -- "${tables[@]}"
}
