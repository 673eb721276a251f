"""What the verbs in Python share: exit codes, the progress bar, and outputs that appear whole or not at all."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from ._errors import InvalidError, TenpakError


def guarded(verb: Callable[[], int]) -> int:
    """Run a verb and return its exit code: its own, 2 could not run, 130 and 143 stopped by a signal."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return verb()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Nobody reads on; the interpreter must not try again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (TenpakError, ImportError, OSError, ValueError, RuntimeError, MemoryError) as error:
        print(f"tenpak: {_message(error)}", file=sys.stderr)
        return 2


def _terminate(number: int, frame: FrameType | None) -> None:
    """End by an exception, so that temporary files go."""
    sys.exit(128 + number)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def tokens(text: str) -> int | None:
    """Read a number of tokens, or ``all``."""
    return None if text == "all" else int(text)


def check_output(path: Path | None, force: bool) -> None:
    """Check, before hours are spent, that a file can be written.

    Raises
    ------
    InvalidError
        There is no directory for it, or something is there already.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise InvalidError(f"{path}: there is no directory {path.parent}, make it first")
    if path.is_dir() or (path.exists() and not force):
        raise InvalidError(f"{path}: exists; pass --force to replace it" if path.is_file() else f"{path}: not a file")


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a file that appears whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        fill(temporary)
        temporary.chmod(0o666 & ~umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def umask() -> int:
    """Return the permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Bar:
    """A progress bar on standard error, where that is a terminal."""

    def __init__(self, hidden: bool) -> None:
        """Take whether none is wanted."""
        self._shown = sys.stderr.isatty() and not hidden
        self._bar: object = None

    def __enter__(self) -> "Bar":
        """Draw nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()  # type: ignore[attr-defined]

    def step(self, done: int, total: int, name: str) -> None:
        """Show how far the work is."""
        if not self._shown:
            return
        if self._bar is None:
            from tqdm import tqdm  # comes with transformers

            self._bar = tqdm(total=total, unit="window", leave=False, dynamic_ncols=True)
        self._bar.set_description(name, refresh=False)  # type: ignore[attr-defined]
        self._bar.update(done - self._bar.n)  # type: ignore[attr-defined]
