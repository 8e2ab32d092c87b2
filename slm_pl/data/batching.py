"""Which examples make which micro-batch of which optimizer step, and how they lie in it.

An optimizer step always sees ``global_batch`` examples, whatever the number of processes and micro-batches they are
spread over, and every micro-batch carries the number of labels of the whole step. So the gradient is that of the mean
over all labels of the step, and one process and many train alike.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

IGNORED_LABEL = -100

Batching = Literal["packed", "grouped", "padded"]
GROUPED = 50
"""How many micro-batches are sorted by length together; with more, a step would hold one length only."""


class Example(TypedDict):
    """One tokenised example; both lists are equally long."""

    input_ids: list[int]
    labels: list[int]


class Batch(TypedDict):
    """A micro-batch of one process, each tensor int64 ``[rows, length]``.

    Attributes:
        input_ids: Token ids; the padding is on the right.
        position_ids: They start at 0 with every example, and again with the padding.
        attention_mask: 1 for tokens, 0 for padding. Attention needs none of it: it is causal, the padding comes last.
        labels: What each position holds, where it is to be predicted; -100 elsewhere, and where an example begins.
        step_labels: Labels that count in the whole optimizer step, over all micro-batches and processes.
        step_tokens: Its tokens, padding excluded.
        most_labels: Labels of that one of its micro-batches that has the most.
        tokens: Tokens of this micro-batch, padding excluded.
        examples: Examples of it.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    step_labels: int
    step_tokens: int
    most_labels: int
    tokens: int
    examples: int


class Slot(NamedTuple):
    """One micro-batch to be made: the indices of its examples, and how much its optimizer step has."""

    indices: tuple[int, ...]
    step_labels: int
    step_tokens: int
    most_labels: int


def pack(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Deals examples out to rows of nearly equal length: the longest first, each to the shortest row so far.

    Args:
        lengths: Tokens of every example.
        rows: How many rows; some stay empty if there are fewer examples.

    Returns:
        For every row, the positions in ``lengths``. (Graham's LPT rule: the longest row is at most 4/3 of the best.)
    """
    dealt: list[list[int]] = [[] for _ in range(rows)]
    heap = [(0, row) for row in range(rows)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        filled, row = heapq.heappop(heap)
        dealt[row].append(index)
        heapq.heappush(heap, (filled + lengths[index], row))
    return dealt


def collate(examples: Sequence[Example], pad_id: int, row_length: int | None, slot: Slot) -> Batch:
    """Lays examples out in rows.

    Args:
        examples: What the micro-batch holds. With none, it is one padded position without a label: a process that has
            nothing left to do in a step still takes part in it.
        pad_id: Fills ``input_ids``.
        row_length: Examples are packed, several in a row, into as few rows as this many tokens each would take; the
            rows are then filled evenly. ``None``: one example a row.
        slot: Which micro-batch this is.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    if row_length is None:
        rows = [[index] for index in range(len(examples))]
    else:
        rows = [row for row in pack(lengths, math.ceil(sum(lengths) / row_length)) if row]
    shape = (max(len(rows), 1), max((sum(lengths[i] for i in row) for row in rows), default=1))
    batch: Batch = {
        "input_ids": torch.full(shape, pad_id),
        "position_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED_LABEL),
        "step_labels": slot.step_labels,
        "step_tokens": slot.step_tokens,
        "most_labels": slot.most_labels,
        "tokens": sum(lengths),
        "examples": len(examples),
    }
    for number, row in enumerate(rows):
        start = 0
        for index in row:
            end = start + lengths[index]
            batch["input_ids"][number, start:end] = torch.tensor(examples[index]["input_ids"])
            batch["position_ids"][number, start:end] = torch.arange(lengths[index])
            batch["attention_mask"][number, start:end] = 1
            batch["labels"][number, start:end] = torch.tensor(examples[index]["labels"])
            batch["labels"][number, start] = IGNORED_LABEL  # nothing of its own stands before it
            start = end
        batch["position_ids"][number, start:] = torch.arange(shape[1] - start)
    return batch


@dataclass
class Schedule:
    """The micro-batches of every optimizer step: a function of the step's number and the seed alone.

    Attributes:
        lengths: Tokens of every example.
        counted: Labels that count of every example.
        global_batch: Examples of an optimizer step; the last one of an epoch may have fewer.
        micro_batches: Micro-batches of a step in each process.
        world_size: Processes.
        batching: ``packed`` gives the micro-batches of a step equally many tokens, ``padded`` equally many examples;
            ``grouped`` sorts some 50 micro-batches' worth of examples by length first, and shuffles the micro-batches.
        seed: Of the order, which is another one in every epoch; ``None`` keeps the order of the examples.
    """

    lengths: Sequence[int]
    counted: Sequence[int]
    global_batch: int
    micro_batches: int
    world_size: int
    batching: Batching
    seed: int | None

    def __post_init__(self) -> None:
        """Nothing is shuffled yet."""
        self._epoch, self._order = -1, list(range(len(self.lengths)))

    @property
    def slots(self) -> int:
        """Micro-batches of a step over all processes."""
        return self.micro_batches * self.world_size

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(len(self.lengths) / self.global_batch)

    def step(self, number: int) -> list[Slot]:
        """The micro-batches of one step; process r takes every ``world_size``-th, from the r-th on."""
        epoch, number = divmod(number, self.steps)
        if self.seed is not None and epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        indices = self._order[number * self.global_batch : (number + 1) * self.global_batch]
        labels = sum(self.counted[index] for index in indices)
        tokens = sum(self.lengths[index] for index in indices)
        if self.batching == "packed":
            dealt = pack([self.lengths[index] for index in indices], self.slots)
            parts = [[indices[i] for i in slot] for slot in dealt]
        else:
            size, more = divmod(len(indices), self.slots)
            ends = [(slot + 1) * size + min(slot + 1, more) for slot in range(self.slots)]
            parts = [indices[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        most = max(sum(self.counted[index] for index in part) for part in parts)
        return [Slot(tuple(part), labels, tokens, most) for part in parts]

    def _shuffled(self, epoch: int) -> list[int]:
        generator = random.Random(f"{self.seed} {epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        if self.batching != "grouped":
            return order
        size = self.global_batch // self.slots or 1
        chunk = math.ceil(GROUPED / self.slots) * self.slots * size
        groups: list[list[int]] = []
        rest: list[int] = []
        for start in range(0, len(order), chunk):
            near = sorted(order[start : start + chunk], key=lambda index: self.lengths[index])
            parts = [near[i : i + size] for i in range(0, len(near), size)]
            generator.shuffle(parts)
            # A short one in between would shift all that follow out of their micro-batches.
            groups += [part for part in parts if len(part) == size]
            rest += [index for part in parts if len(part) < size for index in part]
        return [index for part in groups for index in part] + rest


class StepSampler(DistributedSampler[Slot]):
    """This process's micro-batches of one epoch, from the optimizer step that comes next.

    It is told the step and does not count, so that a run that goes on from a checkpoint gets the very batches that an
    uninterrupted one would have got. Being a DistributedSampler, Lightning does not replace it.

    Args:
        schedule: What there is.
        rank: Of this process.
        steps_done: Tells how many optimizer steps were made so far.
    """

    def __init__(self, schedule: Schedule, rank: int, steps_done: Callable[[], int]) -> None:
        self.schedule, self.rank, self.steps_done = schedule, rank, steps_done

    def __iter__(self) -> Iterator[Slot]:
        first = self.steps_done()
        for number in range(first, first + self.schedule.steps):
            yield from self.schedule.step(number)[self.rank :: self.schedule.world_size]

    def __len__(self) -> int:
        return self.schedule.steps * self.schedule.micro_batches

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the step says which epoch it is of."""


class MicroBatches(Dataset[Batch]):
    """Makes the micro-batch of a :class:`Slot`.

    Args:
        examples: Map-style, such as an Arrow table on disk.
        pad_id: See :func:`collate`.
        row_length: See :func:`collate`.
    """

    def __init__(self, examples: Sequence[Example], pad_id: int, row_length: int | None) -> None:
        self.examples, self.pad_id, self.row_length = examples, pad_id, row_length

    def __getitem__(self, slot: Slot) -> Batch:
        examples = [self.examples[index] for index in slot.indices]
        return collate(examples, self.pad_id, self.row_length, slot)


class ResumableLoader(DataLoader[Batch]):
    """A loader that asks its sampler where to start when the first batch is wanted.

    Lightning makes the iterator long before, when it does not know yet how many steps the checkpoint had done.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Nothing: the optimizer step says where to start. Lightning takes loaders without this for not resumable."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing."""


def only(items: list[Any]) -> Any:
    """The one item of a list."""
    (item,) = items
    return item
