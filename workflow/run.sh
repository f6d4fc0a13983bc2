#!/usr/bin/env bash
# Runs Snakemake on a folder that a killed Snakemake may have left locked: run.sh FOLDER [SNAKEMAKE OPTIONS] -- TARGET ...
#
# Snakemake does not see that the process of a lock is gone. Here the lock is removed if no other Snakemake works in the
# folder on this machine; otherwise Snakemake itself says that the folder is locked. Runs of other machines are not seen:
# on a shared disk, start all runs of a folder from one machine.
set -euo pipefail
folder=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)

# A Snakemake process works in its --directory, and its user owns its locks. The folder of another user's process cannot
# be read: that process counts if a lock is its user's.
is_free() {
  python3 - "$folder" "$locks" <<'PYTHON'
import os, sys
import psutil

folder, me = os.path.realpath(sys.argv[1]), psutil.Process()
ours = {me.pid, *(each.pid for each in me.parents())}
owners = {lock.stat().st_uid for lock in os.scandir(sys.argv[2])}
for process in psutil.process_iter():
    try:
        words = process.cmdline()
        if process.pid in ours or process.uids().effective not in owners:
            continue
        if not any(os.path.basename(word) == "snakemake" for word in words):
            continue
        if process.status() != psutil.STATUS_ZOMBIE and os.path.realpath(process.cwd()) == folder:
            sys.exit(1)
    except psutil.NoSuchProcess:
        continue
    except psutil.AccessDenied:
        sys.exit(1)
PYTHON
}

locks=$folder/.snakemake/locks
if [[ -n $(ls -A "$locks" 2> /dev/null) ]]; then
  (
    # One at a time: a second run must not remove the lock that the first one takes next.
    if command -v flock > /dev/null; then flock 9; fi
    if [[ -n $(ls -A "$locks" 2> /dev/null) ]] && is_free; then
      echo "$folder: removing the lock of a Snakemake that is gone" >&2
      rm -rf "$locks" # as `snakemake --unlock` does
    fi
  ) 9> "$folder/.snakemake/unlocking"
fi
exec snakemake --snakefile "$root/Snakefile" --directory "$folder" "$@"
