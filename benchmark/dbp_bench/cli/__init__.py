"""The command line. Thin: heavy imports are inside the verbs, and no user's mistake is a traceback.

Exit codes: 0 done; 1 a check failed; 2 the request, an entry or a file is wrong; 3 an attack or a
defense failed while running; 130 stopped (the same command continues).
"""

import os
import signal
import sys


def main() -> None:
    """Entry point of the ``dbp-bench`` command."""
    # Nothing is imported before this: an interrupt in the first moments is one line, too.
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        from dbp_bench.cli.start import start

        start()
    except KeyboardInterrupt:
        print("dbp-bench: stopped. The same command continues where this one was.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
