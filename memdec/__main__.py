"""The command `memdec`, also as `python -m memdec`: stopped from the keyboard, it ends in one line, with exit code 130.

The command line is imported inside, because its imports take long enough to be interrupted, too.
"""

import gc
import sys


def main() -> None:
    """Run the command line."""
    # Objects from import to exit are searched for cycles again and again: 0.9 of 4.4 CPU seconds of a start with torch.
    gc.set_threshold(50_000, 20, 20)
    try:
        from memdec import cli

        cli.main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is finished", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
