import pytest

from callbacks.efficiency import Efficiency
from slm_pl.errors import UsageError
from slm_pl.evaluation.efficiency.protocols import Point, grid, with_lengths


def numbers(points):
    return [(point.batch_size, point.prompt_tokens, point.new_tokens, point.repeats) for point in points]


# --- As published ---


def test_shortened_llama():
    rules, points = grid("shortened_llama")
    batches = (1, 8, 16, 32, 64, 128, 256)
    assert sorted(numbers(points), key=str) == sorted(
        ((batch, None, new, 20) for batch in batches for new in (128, 512)), key=str
    )
    assert (rules.name, rules.warmup, rules.sampling) == ("shortened_llama", 10, "sampled")
    assert rules.prompt == "The Leaning Tower of Pisa is known for"


def test_sleb():
    rules, points = grid("sleb")
    assert numbers(points) == [(1, 2048, 0, 50), (64, 64, 128, 10)]
    assert (rules.name, rules.warmup, rules.sampling, rules.prompt) == ("sleb", 1, "greedy", None)


def test_llm_pruner():
    rules, points = grid("llm_pruner")
    assert [(point.batch_size, point.prompt_tokens, point.new_tokens) for point in points] == [(1, 64, 0)]
    assert (rules.name, rules.sampling, rules.prompt) == ("llm_pruner", "greedy", None)


def test_serving():
    _, points = grid("serving")
    assert [point.batch_size for point in points] == [2**power for power in range(8)]
    assert {(point.prompt_tokens, point.new_tokens) for point in points} == {(512, 128)}


def test_without_a_protocol_the_point_that_is_quoted_most():
    rules, points = grid()
    assert rules == grid("shortened_llama")[0]
    assert numbers(points) == [(1, None, 128, 20)]


# --- Changed ---


def test_given_dimensions_replace_the_protocols():
    _, points = grid("sleb", batch_size=[2, 4])
    assert numbers(points) == [(2, 2048, 0, 50), (4, 2048, 0, 50), (2, 64, 128, 10), (4, 64, 128, 10)]
    _, points = grid("sleb", new_tokens=[0])
    assert numbers(points) == [(1, 2048, 0, 50), (64, 64, 0, 10)]
    _, points = grid("sleb", prompt_tokens=[32], repeats=3)
    assert numbers(points) == [(1, 32, 0, 3), (64, 32, 128, 3)]
    _, points = grid(batch_size=[1, 3], prompt_tokens=[5, 7], new_tokens=[2])
    assert sorted(numbers(points)) == [(1, 5, 2, 20), (1, 7, 2, 20), (3, 5, 2, 20), (3, 7, 2, 20)]


def test_each_point_once():
    _, points = grid("shortened_llama", new_tokens=[16])
    assert numbers(points) == [(batch, None, 16, 20) for batch in (1, 8, 16, 32, 64, 128, 256)]
    assert len(grid("shortened_llama", batch_size=[1, 1], new_tokens=[16, 16])[1]) == 1
    # Both points of the protocol become this one; two of them could not be told apart in the record.
    assert numbers(grid("sleb", batch_size=[2], prompt_tokens=[10], new_tokens=[4])[1]) == [(2, 10, 4, 50)]


def test_own_prompts_have_their_own_length():
    _, points = grid("sleb", own_prompt=True)
    assert numbers(points) == [(1, None, 0, 50), (64, None, 128, 10)]


def test_lengths_of_texts_where_none_is_named():
    points = with_lengths([Point(3, None, 4, 2), Point(3, 9, 4, 2)], lambda batch_size: 10 * batch_size)
    assert points == [Point(3, 30, 4, 2, own_text=True), Point(3, 9, 4, 2)]


def test_point_in_words():
    assert str(Point(1, None, 128, 20)) == "batch 1, 128 tokens"
    assert str(Point(64, 2048, 0, 10)) == "batch 64, 2,048 + 0 tokens"


# --- Bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": [1, 0]}, "batch_size 0; allowed is 1 or more"),
        ({"batch_size": []}, "empty list for batch_size"),
        ({"prompt_tokens": [0]}, "prompt_tokens 0; allowed is 1 or more"),
        ({"prompt_tokens": []}, "empty list for prompt_tokens"),
        ({"new_tokens": [-1]}, "new_tokens -1; allowed is 0 or more"),
        ({"new_tokens": []}, "empty list for new_tokens"),
        ({"repeats": 1}, "repeats 1; allowed is 2 or more"),
    ],
)
def test_bad_numbers(arguments, message):
    with pytest.raises(UsageError, match=message):
        grid(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"repeats": 0}, "repeats 0"),
        ({"warmup": -1}, "warmup -1; allowed is 0 or more"),
        ({"prompt": "a", "prompt_tokens": 3}, "a prompt and prompt_tokens 3"),
        ({"compile": True}, "Add cache: static"),
    ],
)
def test_bad_input_of_the_callback(arguments, message):
    with pytest.raises(UsageError, match=message):
        Efficiency(**arguments)


def test_callback_takes_the_protocols_rules_unless_told_otherwise():
    assert Efficiency(protocol="sleb").warmup == 1
    assert Efficiency(protocol="sleb", warmup=0).warmup == 0
    assert Efficiency().texts == ["The Leaning Tower of Pisa is known for"]
    assert Efficiency(protocol="sleb").texts is None
    own = Efficiency(protocol="sleb", prompt=["One", "Two"])
    assert (own.texts, [point.prompt_tokens for point in own.points]) == (["One", "Two"], [None, None])
    forward = Efficiency(protocol="llm_pruner", compile=True)  # no cache, whose shapes would change
    assert (forward.switches.compile, forward.switches.cache) == (True, "dynamic")
