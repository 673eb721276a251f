"""The console script: hands its arguments to the command line in Rust."""

import sys

from . import _tenpak


def main() -> int:
    """Run ``tenpak`` with the arguments of the process and return its exit code."""
    return _tenpak.main(["tenpak", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
