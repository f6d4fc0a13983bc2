"""The command `memdec`, also as `python -m memdec`: stopped from the keyboard, it ends in one line, with exit code 130.

The command line is imported inside, because its imports take long enough to be interrupted, too.
"""

import gc
import sys


def main() -> None:
    """Run the command line."""
    # Fewer searches for cycles among what imports leave: 0.7 of 5.2 CPU seconds of a start with the training libraries.
    gc.set_threshold(50_000, 20, 20)
    try:
        from memdec import cli

        cli.main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is finished", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        gc.freeze()  # the interpreter searches once more as it ends: 0.9 s with the training libraries


if __name__ == "__main__":
    main()
