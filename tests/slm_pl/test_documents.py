import json

import pytest

from slm_pl.documents import check_yaml, parse_json


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -2.5, None, True, {"é": "\U0001f600"}]},
        -(10**98),
        1e999,
        [[[[]]], {"x": {"y": {}}}] * 1000,
        list(range(200_000)),
    ],
)
def test_what_is_sound_is_read_as_json_reads_it(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 101 + "]" * 101, "nested more than 100 levels"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested more than 100 levels"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 100 levels"),
        ("[" * 100_000, "nested more than 100 levels"),
        ("1" * 101, "a number of 101 digits; allowed are 100"),
        ('{"a": [-' + "1" * 5000 + "]}", "a number of 5,001 digits"),
        (r'["\ud800"]', "half a surrogate pair"),
        (r'{"a": {"x\udfff": 1}}', "half a surrogate pair"),
        ("{", "Expecting property name"),
    ],
)
def test_what_nobody_can_use_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_the_bounds_themselves_are_allowed():
    assert parse_json("[" * 100 + "]" * 100) is not None
    assert parse_json("1" * 100) == int("1" * 100)
    assert parse_json(r'"\ud83d\ude00"') == "\U0001f600"
    assert parse_json(r'"\ud800"', unicode=False) == "\ud800"


def test_yaml_that_stands_for_more_than_it_says_is_refused():
    few = {"a": [1, {"b": ["x"] * 1000}] * 9}
    check_yaml(few)
    bomb: list[object] = ["x"] * 9
    for _ in range(40):
        bomb = [bomb] * 9
    with pytest.raises(ValueError, match="more than 100,000 values"):
        check_yaml({"a": bomb})
    ring: list[object] = []
    ring.append(ring)
    with pytest.raises(ValueError, match="more than 100 levels"):
        check_yaml(ring)


def test_yaml_with_a_number_that_no_float_holds_is_refused():
    check_yaml({"a": [10**100 - 1, True, 1e308]})
    with pytest.raises(ValueError, match="a whole number of more than 100 digits"):
        check_yaml({"a": [{"b": -(10**100)}]})
