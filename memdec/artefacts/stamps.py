"""What Snakemake notices about the files that a run is made from: their content, and not when they were copied.

Snakemake asks at every start, on a cluster in every job. So hashes are kept in a file, and a source is read again only
where its inode, size or times differ.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from memdec.artefacts import artefact

_State = list[int | str]


class Stamps:
    """Hashes of source files, kept in the file `kept`; without it they are made again."""

    def __init__(self, kept: Path) -> None:
        self._kept = kept
        self._known = self._read()
        # What changed since then is not kept: a second change may have the same time.
        self._settled = time.time_ns() - int(artefact.FRESH * 1e9)

    def of(self, files: Iterable[Path]) -> list[str]:
        """xxh3_128 (hex) of the content of each file."""
        names = [str(file.resolve()) for file in files]
        states = {name: _state(Path(name)) for name in names}
        changed = [name for name, state in states.items() if self._known.get(name, [])[:-1] != state]
        for name in tqdm(changed, desc="hash source files", unit="file", delay=2):
            self._known[name] = [*states[name], artefact.content_hash(Path(name))]
        if changed:
            lasting = {name: each for name, each in self._known.items() if max(map(int, each[2:4])) < self._settled}
            artefact.write_bytes(self._kept, json.dumps(lasting, sort_keys=True).encode())
        return [str(self._known[name][-1]) for name in names]

    def _read(self) -> dict[str, _State]:
        try:
            known = json.loads(self._kept.read_bytes())
            return {name: each for name, each in known.items() if len(each) == 5}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}


def _state(file: Path) -> _State:
    """Inode, size and times; not the device, which differs between the nodes of a cluster."""
    now = file.stat()
    return [now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns]
