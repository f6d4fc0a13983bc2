"""Keep the answers of different settings apart in lm-eval's own cache of answers (`--use_cache`).

lm-eval looks an answer up by the text of a request alone. So a run at another alpha, with another memory or another
dtype would get the answers of the first run. The cache is an SQLite file with one table. A model of ours makes it use
a table of its own, whose name is a hash of everything that an answer depends on besides the request.
"""

from collections.abc import Mapping
from typing import Any

from memdec.artefacts import artefact
from memdec.errors import ConfigError

NOTHING = "memdec-nothing"


def use_table(cache: Any, setting: Mapping[str, Any] | None) -> None:
    """Make lm-eval's cache read and write only answers of one setting.

    Args:
        cache: The `SqliteDict` of lm-eval's `CachingLM`.
        setting: Everything that an answer depends on besides the request. None: answers depend on something that
            lm-eval does not look up; then a table is used that ignores every insert, so that nothing is ever found.

    Raises:
        ConfigError: The cache is not the one that lm-eval 0.4.13 has.
    """
    if not hasattr(cache, "tablename") or not hasattr(getattr(cache, "conn", None), "execute"):
        raise ConfigError(
            f"--use_cache: expected lm-eval's SQLite file, found {type(cache).__name__}; use scores=FOLDER in --model_args"
        )
    name = NOTHING if setting is None else f"memdec-{artefact.digest(dict(setting))}"
    cache.conn.execute(f'CREATE TABLE IF NOT EXISTS "{name}" (key TEXT PRIMARY KEY, value BLOB)')
    if setting is None:
        cache.conn.execute(
            f'CREATE TRIGGER IF NOT EXISTS "{name}-ignore" BEFORE INSERT ON "{name}" BEGIN SELECT RAISE(IGNORE); END'
        )
    cache.conn.commit()
    cache.tablename = name
