"""The exceptions of tenpak; what the operating system refuses is an ``OSError``, missing memory a ``MemoryError``."""

__all__ = ["CorruptError", "InvalidError", "LimitError", "NonfiniteError", "TenpakError", "UnsupportedError"]


class TenpakError(Exception):
    """Whatever tenpak could not do."""


class InvalidError(TenpakError, ValueError):
    """The caller asked for something impossible: fix the call."""


class NonfiniteError(InvalidError):
    """A weight is NaN or infinite; the message names tensor, first index and count."""


class CorruptError(TenpakError):
    """The file contradicts itself: fetch or write it again."""


class UnsupportedError(TenpakError):
    """The file is sound but newer than, or foreign to, this build: upgrade or convert."""


class LimitError(TenpakError):
    """A number in a file exceeds a cap."""
