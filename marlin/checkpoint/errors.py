"""The one error of this package. Every module here raises it; the command line prints it."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message is one sentence."""


def first_line(error: BaseException) -> str:
    """What another library's error says, cut to a line, so that ours stays a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
