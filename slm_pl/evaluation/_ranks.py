"""Measurements that the processes of a run share: each does its part, all end with the whole."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from slm_pl.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")


def world() -> tuple[int, int]:
    """The rank of this process and how many there are; (0, 1) where torch.distributed is not in use."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(items: Sequence[T]) -> list[T]:
    """This process' part: items ``rank``, ``rank + world_size``, … Empty where there are more ranks than items."""
    rank, size = world()
    return list(items[rank::size])


def gather(part: list[R]) -> list[R]:
    """The results of all processes in the order of the items that :func:`share` dealt out, one result for each.

    All processes call it; what they give must be picklable and not on a GPU.
    """
    parts = _all(part)
    size = len(parts)
    return [parts[item % size][item // size] for item in range(sum(map(len, parts)))]


@contextlib.contextmanager
def patiently() -> Iterator["dist.ProcessGroup | None"]:
    """A group for :func:`agreed` in which processes wait for days: half an hour is usual. All processes enter it."""
    _, size = world()
    if size == 1:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def agreed(work: Callable[[], R], group: "dist.ProcessGroup | None" = None) -> R:
    """What ``work`` returns; a failure in one process is that of all, so that none waits for it in vain.

    All processes call it, each with work of its own in which none waits for another; in a group that is not the usual
    one, if the work takes long.

    Raises:
        FloatingPointError: If ``work`` raised it in any process.
        UsageError: Likewise.
        RuntimeError: If it raised something else in another process.
    """
    found: list[R] = []
    own: Exception | None = None
    try:
        found.append(work())
    except Exception as error:
        own = error
    for rank, failure in enumerate(_all(_told(own), group)):
        if failure is not None:
            if own is not None:
                raise own
            kind, message = failure
            known = {"FloatingPointError": FloatingPointError, "UsageError": UsageError}
            raise known[kind](message) if kind in known else RuntimeError(f"Rank {rank} failed with {kind}: {message}")
    return found[0]


def together(items: Sequence[T], work: Callable[[list[T]], list[R]]) -> list[R]:
    """What ``work`` makes of the items, one result for each, in their order; every process does its share.

    Args:
        items: The same on every process.
        work: Gets this process' share. Its results must be picklable and not on a GPU.

    Returns:
        The same on every process.

    Raises:
        FloatingPointError: If ``work`` raised it in any process.
        UsageError: Likewise.
        RuntimeError: If it raised something else in another process.
    """
    return gather(agreed(lambda: work(share(items))))


def _told(error: Exception | None) -> tuple[str, str] | None:
    """An exception as every process can unpickle it."""
    return None if error is None else (type(error).__name__, str(error))


def _all(mine: R, group: "dist.ProcessGroup | None" = None) -> list[R]:
    """What each process has, by rank."""
    _, size = world()
    if size == 1:
        return [mine]
    theirs: list[R] = [mine] * size
    dist.all_gather_object(theirs, mine, group=group)
    return theirs
