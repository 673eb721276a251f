"""The console script: hands its arguments to the command line in Rust."""

import signal
import sys

from . import _tenpak


def main() -> int:
    """Run ``tenpak`` with the arguments of the process and return its exit code."""
    # Rust watches for Ctrl-C and gives 130; Python's handler would raise KeyboardInterrupt over it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _tenpak.main(["tenpak", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
