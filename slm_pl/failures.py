"""What the user is told of a failure: one message, where it is one that the user can mend."""

import errno
import re

from lightning.fabric.utilities.exceptions import MisconfigurationException

from slm_pl.errors import UsageError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)
"""What is wrong with a disk or the rights on it, not with this program."""
_PEER = re.compile(
    r"Connection (?:closed|reset|refused)|Broken pipe|[Tt]imed out (?:waiting|after)|ncclRemoteError|"
    r"remote process exited|Socket Timeout",
)
"""How gloo, NCCL and torch's store say that another process does not answer any more."""


def message_of(error: Exception) -> str | None:
    """One message for a failure that is no fault of this program; None for others, whose traceback is needed.

    Args:
        error: What ended a command.
    """
    if isinstance(error, UsageError | FloatingPointError | MisconfigurationException):
        return str(error)
    if isinstance(error, ValueError):
        # Of a class inside a list or an optional, jsonargparse wraps what its __init__ raised.
        cause = error.__cause__
        while cause is not None and not isinstance(cause, UsageError):
            cause = cause.__cause__
        return None if cause is None else str(cause)
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f" at {error.filename}" if error.filename else ""
        return (
            f"The disk{where} says: {error.strerror}. Make room there, or give a place that you may use; what was "
            "finished before is whole, and the same command goes on."
        )
    if _is_of_peer(error):
        reason = " ".join(str(error).partition("\n")[0].split())
        return (
            f"Another process of this run has ended or does not answer ({reason}). What it said itself stands above or "
            "in its own log; if nothing does, it was killed: by you, by the scheduler, or for want of memory. When "
            "that is mended, the same command goes on (fit: with --ckpt_path last)."
        )
    return None


def _is_of_peer(error: Exception) -> bool:
    """Whether processes that work together have lost one another."""
    import torch.distributed as dist

    if not isinstance(error, RuntimeError):
        return False
    of_group = "gloo" in str(error) or "nccl" in str(error).lower() or isinstance(error, dist.DistError)
    return of_group and _PEER.search(str(error)) is not None
