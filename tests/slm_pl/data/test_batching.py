import itertools
import random

import pytest
import torch

from slm_pl.data.batching import MicroBatches, ResumableLoader, Schedule, Slot, StepSampler, collate, pack

LENGTHS = random.Random(5).choices(range(3, 60), k=103)


def schedule(**changes):
    settings = {"lengths": LENGTHS, "counted": [n // 2 for n in LENGTHS], "global_batch": 16, "micro_batches": 2}
    settings |= {"world_size": 2, "batching": "packed", "seed": 7, **changes}
    return Schedule(**settings)


def indices(slots):
    return [index for slot in slots for index in slot.indices]


@pytest.mark.parametrize("batching", ["packed", "grouped", "padded"])
@pytest.mark.parametrize(
    ("micro_batches", "world_size", "global_batch"), [(2, 2, 16), (1, 1, 16), (4, 3, 12), (3, 2, 7)]
)
def test_an_epoch_holds_every_example_once(batching, micro_batches, world_size, global_batch):
    plan = schedule(batching=batching, micro_batches=micro_batches, world_size=world_size, global_batch=global_batch)
    assert plan.steps == -(-103 // global_batch)
    for epoch in range(2):
        steps = [plan.step(epoch * plan.steps + number) for number in range(plan.steps)]
        assert sorted(itertools.chain.from_iterable(map(indices, steps))) == list(range(103))
        assert [len(indices(step)) for step in steps] == [global_batch] * (103 // global_batch) + [103 % global_batch]
        for step in steps:
            assert len(step) == micro_batches * world_size
            assert {slot.step_labels for slot in step} == {sum(LENGTHS[i] // 2 for i in indices(step))}
            assert {slot.step_tokens for slot in step} == {sum(LENGTHS[i] for i in indices(step))}
            assert {slot.most_labels for slot in step} == {max(sum(LENGTHS[i] // 2 for i in s.indices) for s in step)}


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_step_has_the_same_examples_however_it_is_spread(batching):
    one = schedule(batching=batching, micro_batches=1, world_size=1)
    many = schedule(batching=batching, micro_batches=2, world_size=4)
    for number in range(15):
        assert sorted(indices(one.step(number))) == sorted(indices(many.step(number)))


def test_the_order_is_another_one_in_every_epoch_and_with_every_seed():
    orders = [
        [indices(plan.step(epoch * plan.steps + number)) for number in range(plan.steps)]
        for plan, epoch in [(schedule(), 0), (schedule(), 1), (schedule(seed=8), 0), (schedule(), 0)]
    ]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    unshuffled = schedule(seed=None, batching="padded", micro_batches=1, world_size=1)
    assert indices(unshuffled.step(1)) == list(range(16, 32))


def padded_positions(plan):
    """Positions without a token in an epoch, one example a row."""
    slots = [slot for number in range(plan.steps) for slot in plan.step(number)]
    lengths = [[LENGTHS[i] for i in slot.indices] for slot in slots]
    return sum(max(found, default=0) * len(found) - sum(found) for found in lengths)


def test_grouped_batches_need_less_padding():
    assert padded_positions(schedule(batching="grouped")) < 0.4 * padded_positions(schedule(batching="padded"))


def test_packed_micro_batches_of_a_step_have_nearly_equally_many_tokens():
    for number in range(6):
        tokens = [sum(LENGTHS[i] for i in slot.indices) for slot in schedule().step(number)]
        assert max(tokens) - min(tokens) <= min(LENGTHS[i] for i in indices(schedule().step(number))) + 10
        assert max(tokens) <= 4 / 3 * sum(tokens) / len(tokens)


def test_pack_deals_the_longest_first_to_the_shortest_row():
    assert pack([3, 9, 4, 4, 1], 2) == [[1, 4], [2, 3, 0]] or pack([3, 9, 4, 4, 1], 2) == [[1, 0], [2, 3, 4]]
    rows = pack([3, 9, 4, 4, 1], 2)
    assert sorted(sum(rows, [])) == [0, 1, 2, 3, 4]
    assert max(sum([3, 9, 4, 4, 1][i] for i in row) for row in rows) <= 12
    assert pack([5], 3) == [[0], [], []]


def test_packed_rows_say_where_examples_begin():
    examples = [
        {"input_ids": [11, 12, 13, 14], "labels": [11, 12, 13, 14]},
        {"input_ids": [21, 22], "labels": [-100, 22]},
        {"input_ids": [31, 32, 33], "labels": [-100, 32, 33]},
    ]
    batch = collate(examples, pad_id=9, row_length=5, slot=Slot((0, 1, 2), 50, 70, 9))
    assert {k: v.tolist() for k, v in batch.items() if isinstance(v, torch.Tensor)} == {
        "input_ids": [[11, 12, 13, 14, 9], [31, 32, 33, 21, 22]],
        "position_ids": [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]],
        "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        # no example predicts the first token of the next
        "labels": [[-100, 12, 13, 14, -100], [-100, 32, 33, -100, 22]],
    }
    assert (batch["step_labels"], batch["step_tokens"], batch["tokens"], batch["examples"]) == (50, 70, 9, 3)


def test_padded_rows_hold_one_example_each():
    examples = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = collate(examples, 9, None, Slot((0, 1), 2, 4, 2))
    assert {k: v.tolist() for k, v in batch.items() if isinstance(v, torch.Tensor)} == {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "position_ids": [[0, 1, 2], [0, 0, 1]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 2, 3], [-100, -100, -100]],
    }
    assert {v.dtype for v in batch.values() if isinstance(v, torch.Tensor)} == {torch.int64}


def test_sampler_starts_where_the_run_is():
    plan, done = schedule(), [0]
    samplers = [StepSampler(plan, rank, lambda: done[0]) for rank in range(2)]
    assert len(samplers[0]) == 14 == len(list(samplers[0]))
    epoch = [list(sampler) for sampler in samplers]
    assert [slot for pair in zip(*epoch, strict=True) for slot in pair] == [s for n in range(7) for s in plan.step(n)]
    done[0] = 3
    assert list(samplers[1])[:8] == epoch[1][6:]
    done[0] = 7
    assert list(samplers[0])[0] == plan.step(7)[0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_asks_where_to_start_when_the_first_batch_is_wanted(num_workers):
    done = [0]
    plan = schedule(world_size=1, batching="padded", seed=None)
    loader = ResumableLoader(
        MicroBatches([{"input_ids": [i], "labels": [i]} for i in range(103)], 0, None),
        sampler=StepSampler(plan, 0, lambda: done[0]),
        batch_size=None,
        num_workers=num_workers,
    )
    batches = iter(loader)
    done[0] = 2
    assert next(batches)["input_ids"][:, 0].tolist() == list(range(32, 40))
    assert next(batches)["input_ids"][:, 0].tolist() == list(range(40, 48))
