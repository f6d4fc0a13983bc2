"""Command `free`: remove keys and indexes from the disk once the targets are made that they were needed for.

The keys are by far the largest files of a run: 374 GB for WikiText-103 with GPT-2 xl. A memory is trained on the targets
and needs no key. The manifests stay, so nothing that was made from the keys is made again. Who still wants to read
them gets one line that says how to make them again.

Output: a JSON file with the folders and the bytes that became free.
"""

from collections.abc import Sequence
from pathlib import Path

from memdec.artefacts import artefact
from memdec.errors import ArtifactError


def run(datastore: Sequence[Path], index: Sequence[Path], targets: Sequence[Path], out: Path) -> None:
    """Remove the files of a datastore and its indexes.

    Args:
        datastore: All shards of one datastore.
        index: The indexes over it.
        targets: Targets for which they were needed.
        out: JSON file to write.

    Raises:
        ArtifactError: Targets are missing, damaged, or made from other keys or another index; nothing was removed then.
    """
    stores = [artefact.read(folder, "datastore", freed=True) for folder in datastore]
    indexes = [artefact.read(folder, "index", freed=True) for folder in index]
    known = {"datastore": {store.facts["keys_recipe"] for store in stores}, "index": {each.recipe for each in indexes}}
    for folder in targets:
        made = artefact.read(folder, "targets")
        for kind, recipes in known.items():
            if kind not in made.inputs:
                raise ArtifactError(
                    f"{folder}: expected targets that were made from the --{kind}, found those of a teacher; give the targets "
                    "that `memdec targets` made"
                )
            if made.inputs[kind] not in recipes:
                raise ArtifactError(
                    f"{folder}: expected targets made from the --{kind} that is given, found ones from another {kind}; "
                    "check the paths"
                )
    folders = {**dict.fromkeys(datastore, "datastore"), **dict.fromkeys(index, "index")}
    artefact.write_json(out, {str(folder): artefact.free(folder, kind) for folder, kind in folders.items()})
