import itertools
import random

import pytest
import torch

from slm_pl.compression.allotment import (
    cost,
    equal_share,
    lowest,
    lowest_in_each,
    published_share,
    same_width,
    wanted_parameters,
)
from slm_pl.compression.plan import count_parameters
from slm_pl.compression.structures import Structure, structures
from slm_pl.errors import UsageError
from tests.helpers.pico import pico_model


def made(group: str, units: int, each: int, head_dim: int = 1) -> Structure:
    return Structure(group, units, (), each, head_dim)


def layers_of(number: int, groups: int, channels: int, group_size: int, channel_size: int):
    """As the layers of a model are: all alike."""
    found = {}
    for layer in range(number):
        if groups:
            found[layer, "attention"] = made("attention", groups, group_size, 8)
        if channels:
            found[layer, "mlp"] = made("mlp", channels, channel_size)
    return found


def total(units, counts) -> int:
    return sum(units[key].unit_parameters * counts[key] for key in units)


def random_layers(seed: int):
    """Layers that are alike, what may go of them, and how many units have to stay."""
    r = random.Random(seed)
    channel = r.randint(1, 200)
    head = channel * r.randint(1, 90)
    units = layers_of(r.randint(1, 9), r.choice([0, 1, 2, 3, 8, 32]), r.randint(8, 300), head, channel)
    least = r.choice([0, 1, 2])
    if least == 2:  # some have no two units; a floor above their number is of no use
        units = {key: s for key, s in units.items() if s.units >= 2}
    most = sum((s.units - least) * s.unit_parameters for s in units.values())
    return r, units, least, most


def by_layer(units, group: str) -> list[tuple[int, str]]:
    return [key for key in units if key[1] == group]


SEEDS = range(150)


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_share_is_exact_to_one_unit_and_even(seed):
    r, units, least, most = random_layers(seed)
    wanted = r.randint(0, most)
    counts = equal_share(units, wanted, least)
    assert counts.keys() == units.keys()
    assert all(0 <= counts[key] <= s.units - least for key, s in units.items())
    # Channels make up the difference to half a channel; heads only where the channels have run out.
    mlps, heads = by_layer(units, "mlp"), by_layer(units, "attention")
    full = all(counts[key] == units[key].units - least for key in mlps)
    unit = units[(heads if full and heads else mlps)[0]].unit_parameters
    assert 2 * abs(wanted - total(units, counts)) <= unit
    for keys in (mlps, heads):
        numbers = [counts[key] for key in keys]
        assert not numbers or max(numbers) - min(numbers) <= 1
        assert numbers == sorted(numbers, reverse=True)  # the lowest layers first
    if heads and not full and mlps:
        # What a head's share is rounded from is at most that of the channels, which fill up what it left: of one more.
        share = max((counts[key] + 1) / units[key].units for key in mlps)
        assert max(counts[key] for key in heads) <= share * units[heads[0]].units + 0.5


def test_equal_share_rounds_attention_to_the_nearest():
    """Of 8 groups and 80 channels, 30 % are 2 groups (2.4) and 24 channels, and 4 for the 0.4."""
    units = layers_of(5, 8, 80, 100, 10)  # a layer has 800 + 800 parameters
    counts = equal_share(units, 5 * 480)
    assert counts == {key: 2 if key[1] == "attention" else 28 for key in units}
    counts = equal_share(units, 5 * 560)  # 35 %: 2.8 groups and 28 channels
    assert counts == {key: 3 if key[1] == "attention" else 26 for key in units}


@pytest.mark.parametrize("seed", range(60))
def test_equal_share_of_unequal_layers_takes_equal_shares(seed):
    r = random.Random(seed)
    units = {(layer, "mlp"): made("mlp", r.randint(20, 200), 7) for layer in range(6)}
    wanted = r.randint(0, 7 * sum(s.units // 2 for s in units.values()))
    counts = equal_share(units, wanted)
    assert 2 * abs(wanted - total(units, counts)) <= 7
    shares = {key: counts[key] / s.units for key, s in units.items()}
    for a, b in itertools.combinations(units, 2):
        # One unit more of the smaller layer, and one less of the other.
        assert abs(shares[a] - shares[b]) <= 1 / min(units[a].units, units[b].units) + 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_same_width_is_one_width_exact_to_a_unit_of_each(seed):
    r, units, least, most = random_layers(seed)
    wanted = r.randint(0, most)
    counts = same_width(units, wanted, least=least)
    assert counts.keys() == units.keys()
    assert all(0 <= counts[key] <= s.units - least for key, s in units.items())
    off, sizes = wanted - total(units, counts), {}
    for group in ("mlp", "attention"):
        keys = by_layer(units, group)
        if keys:
            assert len({counts[key] for key in keys}) == 1
            sizes[group] = sum(units[key].unit_parameters for key in keys)
    # Within half a channel of every layer where any number of heads and channels is, else as near as any.
    tries = [range(units[by_layer(units, group)[0]].units - least + 1) for group in sizes]
    nearest = min(
        abs(wanted - sum(count * size for count, size in zip(some, sizes.values(), strict=True)))
        for some in itertools.product(*tries)
    )
    assert abs(off) <= max(nearest, min(sizes.values()) / 2)


@pytest.mark.parametrize("wanted", range(0, 5 * 1500, 137))
def test_same_width_takes_only_what_the_config_can_say(wanted):
    units, asked = layers_of(5, 8, 80, 100, 10), set()  # a layer has 800 + 800 parameters

    def takes(group, left):
        asked.add((group, left))
        return group == "mlp" or left in (8, 4, 2, 1)

    counts = same_width(units, wanted, takes)
    (heads,), (channels,) = ({counts[key] for key in by_layer(units, group)} for group in ("attention", "mlp"))
    assert 8 - heads in (8, 4, 2, 1)
    assert 0 <= channels < 80
    assert 2 * abs(wanted - total(units, counts)) <= 5 * 10  # half a channel of every layer
    assert all(1 <= left <= {"attention": 8, "mlp": 80}[group] for group, left in asked)


def test_same_width_of_unequal_layers_is_refused():
    units = {(0, "attention"): made("attention", 4, 9), (0, "mlp"): made("mlp", 48, 3), (1, "mlp"): made("mlp", 40, 3)}
    with pytest.raises(UsageError, match=r"uniform is true.*\(mlp: 40 to 48 units\).*uniform: false"):
        same_width(units, 30)


def test_published_share_rounds_as_the_program_does():
    """Read off its lines: ``n = C - int(C * (1 - ratio))`` channels, ``n // head_dim`` heads (sizes of SmolLM2)."""
    units = {(4, "attention"): made("attention", 3, 1, 64), (4, "mlp"): made("mlp", 1536, 1)}
    assert published_share(units, 0.25) == {(4, "attention"): 0, (4, "mlp"): 384}
    assert published_share(units, 0.34) == {(4, "attention"): 1, (4, "mlp"): 523}  # 66 of 192 channels are one head
    assert published_share({(0, "attention"): made("attention", 32, 1, 128)}, 0.25) == {(0, "attention"): 8}


def kept_of(units) -> dict:
    return {key: list(range(s.units)) for key, s in units.items()}


def gone_of(units, stay, there=None) -> dict:
    there = there or kept_of(units)
    return {key: [n for n in there[key] if n not in stay[key]] for key in units}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("least", [0, 1, 2])
def test_lowest_of_units_of_one_size_is_the_cheapest_choice(seed, least):
    """Against all choices of so many units that leave as many as they have to."""
    r = random.Random(seed)
    units = {(layer, "mlp"): made("mlp", r.randint(2, 4), 10) for layer in range(3)}
    scores = {key: torch.tensor([r.random() - 0.5 for _ in range(s.units)]) for key, s in units.items()}
    every = [(key, unit) for key, s in units.items() for unit in range(s.units)]
    number = r.randint(0, sum(s.units - least for s in units.values()))
    stay = lowest(units, scores, 10 * number + r.randint(-4, 4), least)
    gone = {(key, unit) for key, found in gone_of(units, stay).items() for unit in found}
    allowed = [
        chosen
        for chosen in itertools.combinations(every, number)
        if all(sum(key == own for own, _ in chosen) <= s.units - least for key, s in units.items())
    ]
    best = min(allowed, key=lambda chosen: sum(scores[key][unit].item() for key, unit in chosen))
    assert gone == set(best)


@pytest.mark.parametrize("seed", SEEDS)
def test_lowest_is_exact_to_one_unit_and_takes_in_order(seed):
    r, units, least, most = random_layers(seed)
    scores = {key: torch.tensor([r.random() for _ in range(s.units)]) for key, s in units.items()}
    wanted = r.randint(0, most)
    stay = lowest(units, scores, wanted, least)
    counts = {key: s.units - len(stay[key]) for key, s in units.items()}
    assert all(len(stay[key]) >= least and stay[key] == sorted(set(stay[key])) for key in units)
    remaining = wanted - total(units, counts)
    smallest = min(s.unit_parameters for s in units.values())
    assert 2 * remaining >= -smallest  # to the nearest unit, and never a large one too many
    for key, s in units.items():
        # Units of a structure are alike: those that went are those of the lowest scores.
        gone, order = gone_of(units, stay)[key], scores[key].argsort().tolist()
        assert set(gone) == set(order[: len(gone)])
        if len(stay[key]) > least:  # nothing that fits was left
            assert s.unit_parameters > remaining + smallest / 2 or 2 * remaining < smallest


def test_lowest_passes_over_a_unit_too_large_for_the_remainder():
    units = {(0, "attention"): made("attention", 3, 100), (0, "mlp"): made("mlp", 6, 10)}
    scores = {
        (0, "attention"): torch.tensor([3.0, 0.0, 1.0]),
        (0, "mlp"): torch.tensor([5.0, 0.5, 2.0, 9.0, 4.0, 8.0]),
    }
    # Head 1 (100), channel 1 (10); head 2 does not fit into 30; channels 2, 4 and 0 do.
    assert lowest(units, scores, 140) == {(0, "attention"): [0, 2], (0, "mlp"): [3, 5]}
    # It may be half the smallest unit too much: 105 of a wanted 100 are not taken for 94, but for 95 to 104.
    alone = {(0, "attention"): scores[0, "attention"], (0, "mlp"): scores[0, "mlp"] + 10}
    assert len(lowest(units, alone, 94)[0, "attention"]) == 3
    assert lowest(units, alone, 95) == {(0, "attention"): [0, 2], (0, "mlp"): list(range(6))}
    assert lowest(units, alone, 104) == lowest(units, alone, 95)
    assert lowest(units, alone, 106) == {(0, "attention"): [0, 2], (0, "mlp"): [0, 2, 3, 4, 5]}


def test_lowest_goes_on_from_what_is_left_and_keeps_the_floor():
    units = {(layer, "mlp"): made("mlp", 5, 10) for layer in range(2)}
    scores = {(0, "mlp"): torch.tensor([0.0, 1, 2, 3, 4]), (1, "mlp"): torch.tensor([10.0, 11, 12, 13, 14])}
    kept = {(0, "mlp"): [1, 3, 4], (1, "mlp"): [0, 2]}
    assert lowest(units, scores, 30, 1, kept) == {(0, "mlp"): [4], (1, "mlp"): [2]}
    assert lowest(units, scores, 30, 0, kept) == {(0, "mlp"): [], (1, "mlp"): [0, 2]}
    assert lowest(units, scores, 500, 1, kept) == {(0, "mlp"): [4], (1, "mlp"): [2]}
    assert kept == {(0, "mlp"): [1, 3, 4], (1, "mlp"): [0, 2]}


def test_of_equal_scores_the_first_go():
    units = {(layer, group): made(group, 3, 10) for layer in (0, 1) for group in ("attention", "mlp")}
    equal = {key: torch.ones(3) for key in units}
    stay = lowest(units, equal, 50)
    assert stay == {(0, "attention"): [2], (0, "mlp"): [2], (1, "attention"): [1, 2], (1, "mlp"): [0, 1, 2]}
    assert lowest_in_each(equal, {(0, "mlp"): 2, (1, "mlp"): 0}) == {(0, "mlp"): [2], (1, "mlp"): [0, 1, 2]}


def test_lowest_in_each():
    key, other = (0, "mlp"), (3, "attention")
    scores = {key: torch.tensor([4.0, -2.0, 3.0, 0.0, 3.0]), other: torch.tensor([1.0, 0.5])}
    assert lowest_in_each(scores, {key: 3, other: 1}) == {key: [0, 4], other: [0]}
    assert lowest_in_each(scores, {key: 2}, {key: [0, 2, 4]}) == {key: [0]}
    assert lowest_in_each(scores, {other: 2}) == {other: []}


def test_cost_is_of_the_counts_given():
    units = layers_of(2, 2, 5, 100, 3)
    assert cost(units, {(0, "attention"): 1, (1, "mlp"): 4}) == 112


def test_wanted_is_the_share_of_all_parameters():
    model = pico_model()
    units = structures(model, range(6))
    # Two embeddings, the final norm; of a layer: two groups (16 + 8 + 8 rows, 16 columns), 48 channels, two norms.
    parameters = 2 * 512 * 32 + 32 + 6 * (2 * 48 * 32 + 48 * 3 * 32 + 64)
    assert count_parameters(model) == parameters
    assert wanted_parameters(model, 0.2, units) == round(0.2 * parameters)
    most = 6 * (48 * 32 + 47 * 96)
    assert wanted_parameters(model, most / parameters, units) == most
    everything = 6 * (2 * 48 * 32 + 48 * 96)
    assert wanted_parameters(model, everything / parameters, units, least=0) == everything


@pytest.mark.parametrize(
    ("ratio", "least", "message"),
    [
        (
            0.9,
            1,
            r"^ratio 0.9 means 71,338 of 79,264 parameters; .* have 36,288 \(ratio 0.0012 to 0.458\), with one of",
        ),
        (0.6, 0, r"means 47,558 of 79,264 parameters; .* have 46,080 \(ratio 0.0012 to 0.581\)\. Give another ratio"),
        (0.0005, 1, r"means 40 of 79,264 parameters; .*ratio 0.0012 to"),
    ],
)
def test_shares_that_cannot_go_are_refused(ratio, least, message):
    model = pico_model()
    with pytest.raises(UsageError, match=message):
        wanted_parameters(model, ratio, structures(model, range(6)), least)
