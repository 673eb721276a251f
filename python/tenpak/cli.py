"""The console script: hands its arguments to the command line in Rust, and adds the verbs that need PyTorch."""

import signal
import sys
from collections.abc import Sequence

from . import _nvrtc, _tenpak

#: Options that every verb understands and that may stand before it, with the number of values each takes.
_COMMON = {"--threads": 1, "--format": 1, "--quiet": 0, "-q": 0, "--mmap": 0}
#: The verbs that are not in Rust.
_VERBS = ("calibrate", "eval")
_HELP = """
Commands that need PyTorch (pip install "tenpak[eval]"):
  calibrate    Gather statistics of what flows into a model's linear layers, for `tenpak compress --stats`
  eval         Measure what quantization costs a model on a text: KL divergence, perplexity, bits/weight
"""


def main() -> int:
    """Run ``tenpak`` with the arguments of the process and return its exit code."""
    arguments = sys.argv[1:]
    at = _verb(arguments)
    verb = arguments[at] if at < len(arguments) else None
    if verb in _VERBS:
        return _run(verb, [*arguments[:at], *arguments[at + 1 :]])
    if verb == "help" and len(arguments) == at + 2 and arguments[at + 1] in _VERBS:
        return _run(arguments[at + 1], ["--help"])
    if verb == "devices" and (compiler := _nvrtc.find()):
        _tenpak.cuda_use_compiler(str(compiler))
    # Rust watches for Ctrl-C and gives 130; Python's handler would raise KeyboardInterrupt over it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    code = _tenpak.main(["tenpak", *arguments])
    if verb is None or (verb in ("-h", "--help", "help") and not arguments[at + 1 :]):
        # The list of commands has been printed: to standard error where nothing was asked for.
        print(_HELP, end="", file=sys.stderr if verb is None else sys.stdout)
    return code


def _verb(arguments: Sequence[str]) -> int:
    """Return where the verb stands: behind the common options."""
    at = 0
    while at < len(arguments) and (name := arguments[at].partition("=")[0]) in _COMMON:
        at += 1 + (_COMMON[name] if "=" not in arguments[at] else 0)
    return at


def _run(verb: str, arguments: Sequence[str]) -> int:
    """Run a verb of Python; what it needs is imported here and nowhere else."""
    if verb == "calibrate":
        from .calibrate import console as calibrate

        return calibrate.run(arguments)
    from .evaluate import console as evaluate

    return evaluate.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
