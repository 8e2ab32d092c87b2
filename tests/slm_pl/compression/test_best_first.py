"""The search that looks everywhere, against models that are merged and run by hand."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from callbacks import SlidingWindowMerging
from slm_pl.compression import least_squares, surgery
from slm_pl.compression.best_first import MergerCosts, search_best_first
from slm_pl.compression.calibration import LayerReplay
from slm_pl.compression.least_squares import LeastSquares
from slm_pl.compression.plan import Base, MergeLayers, Method, Plan
from slm_pl.compression.scores import CKA, Divergence, FlattenedCosine, Likelihood, TokenCosine
from slm_pl.data import CalibrationSet, CalibrationText
from slm_pl.errors import UsageError
from tests.helpers.pico import pico_model
from tests.helpers.ranks import in_two_processes

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(3, 512, (4, 18), generator=torch.Generator().manual_seed(1))
CALIBRATION = CalibrationSet.from_ids(IDS.tolist(), CalibrationText(source="ids", samples=4, sequence_length=18))
LAYERS = 7


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def merged(windows, consolidation="keep_top", other="top"):
    """A model with these windows merged by the surgery."""
    model = pico_model(num_hidden_layers=LAYERS)
    steps = tuple(MergeLayers(low, high, consolidation, other) for low, high in windows if low < high)
    surgery.apply(model, Plan(Base.of(model), Method("test", {}), None, steps))
    return model


def cost_by_hand(name: str, windows, *how) -> float:
    dense, model = pico_model(num_hidden_layers=LAYERS), merged(windows, *how)
    reference, own = (m.model(input_ids=IDS).last_hidden_state.double() for m in (dense, model))
    if name == "cosine":
        return 1 - torch.cosine_similarity(reference.flatten(1), own.flatten(1), dim=1).mean().item()
    if name == "token_cosine":
        return 1 - torch.cosine_similarity(reference[:, 1:], own[:, 1:], dim=-1).mean().item()
    p, q = (m(input_ids=IDS).logits.double().log_softmax(-1) for m in (dense, model))
    if name == "kl":
        return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()
    return torch.nn.functional.nll_loss(q[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item()


def in_windows(partition, *how) -> tuple[MergeLayers, ...]:
    return tuple(MergeLayers(low, high, *how) for low, high in partition)


SCORES = {"cosine": FlattenedCosine, "token_cosine": TokenCosine, "kl": Divergence, "loss": Likelihood}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("how", [("keep_top", "top"), ("keep_bottom", "bottom"), ("sum", "mean"), ("mean", "top")])
@pytest.mark.parametrize(
    "partition",
    [
        tuple((layer, layer) for layer in range(LAYERS)),
        ((0, 0), (1, 2), (3, 3), (4, 6)),
        ((0, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6)),
    ],
)
def test_costs_are_those_of_the_model_merged_by_hand(name, how, partition):
    model = pico_model(num_hidden_layers=LAYERS)
    replay = LayerReplay(model, IDS.split(3))
    score = SCORES[name](model) if name in ("kl", "loss") else SCORES[name]()
    asked = MergerCosts(replay, [MergeLayers(0, 0, *how)], score, skip_last=0)
    windows = in_windows(partition, *how)
    costs = asked(windows, asked.mergers(windows))
    assert [place for place, _ in costs] == list(range(len(partition) - 1))
    for (place, window), cost in costs.items():
        assert window == MergeLayers(partition[place][0], partition[place + 1][1], *how)
        joined = (*partition[:place], (partition[place][0], partition[place + 1][1]), *partition[place + 2 :])
        assert cost == pytest.approx(cost_by_hand(name, joined, *how), abs=2e-5)


def test_a_model_is_its_own_best():
    model = pico_model(num_hidden_layers=LAYERS)
    final = model.model(input_ids=IDS).last_hidden_state
    for score in (FlattenedCosine(), TokenCosine(), CKA(), Divergence(model)):
        means = score.statistics(final, final, IDS).mean(0).tolist()
        assert score.best - score.combine(means) == pytest.approx(0, abs=1e-6)


def greedy(score: str, wanted: int, skip_last: int) -> list[tuple[int, int]]:
    windows = [(layer, layer) for layer in range(LAYERS)]
    for _ in range(wanted):
        ways = []
        for place in range(len(windows) - 1 - skip_last):
            joined = [*windows[:place], (windows[place][0], windows[place + 1][1]), *windows[place + 2 :]]
            ways.append((cost_by_hand(score, joined), joined))
        windows = min(ways)[1]
    return [window for window in windows if window[0] < window[1]]


@pytest.mark.parametrize(("score", "skip_last"), [("cosine", 1), ("kl", 0), ("loss", 1), ("token_cosine", 2)])
def test_plan_is_greedy_over_all_neighbours_and_runs_few_layers(score, skip_last):
    method = SlidingWindowMerging(remove_layers=3, search="best_first", similarity=score, skip_last=skip_last)
    plan = method.plan(pico_model(num_hidden_layers=LAYERS), CALIBRATION)
    assert [(step.low, step.high) for step in plan.steps] == greedy(score, 3, skip_last)
    phases = [[row for row in plan.trace if row["phase"] == phase] for phase in range(3)]
    assert [len(phase) for phase in phases] == [LAYERS - 1 - skip_last - phase for phase in range(3)]
    expected = LAYERS
    partition = [(layer, layer) for layer in range(LAYERS)]
    for phase in phases:
        first = next((place for place, (low, high) in enumerate(partition) if low < high), len(partition))
        for place in range(len(phase)):
            expected += len(partition) - 1 - place + (place > first)
        (taken,) = [row for row in phase if row["removed"]]
        assert taken["score"] == min(row["score"] for row in phase)
        partition = [w for w in partition if not taken["layer"] <= w[0] <= taken["high"]]
        partition = sorted([*partition, (taken["layer"], taken["high"])])
    assert plan.outcome["layer_forwards"] == expected
    assert plan.outcome["cost"] == min(row["score"] for row in phases[-1])
    assert plan.outcome["removed_layers"] == 3


def joined(partition, place: int) -> tuple[MergeLayers, ...]:
    window = MergeLayers(partition[place].low, partition[place + 1].high)
    return (*partition[:place], window, *partition[place + 2 :])


class Priced:
    """Costs by the partition and the number of the lower window."""

    def __init__(self, price, dense=0.0):
        self.price, self.dense, self.asked = price, dense, 0

    def mergers(self, partition):
        return [
            (place, MergeLayers(lower.low, upper.high))
            for place, (lower, upper) in enumerate(itertools.pairwise(partition))
        ]

    def __call__(self, partition, mergers):
        self.asked += len(mergers)
        return {merger: self.price(partition, merger[0]) for merger in mergers}


def shown(windows) -> tuple[tuple[int, int], ...]:
    return tuple((window.low, window.high) for window in windows if window.low < window.high)


def test_a_beam_finds_what_greed_passes_by():
    # Alone, 0-1 is cheapest; but what is cheap together begins with 2-3.
    prices = {((0, 1),): 1.0, ((2, 3),): 2.0, ((2, 4),): 2.5, ((0, 1), (2, 3)): 9.0}
    costs = Priced(lambda partition, place: prices.get(shown(joined(partition, place)), 10.0 + place))
    assert shown(search_best_first(costs, 5, 2).windows) == ((0, 1), (2, 3))
    found = search_best_first(costs, 5, 2, beam=2)
    assert shown(found.windows) == ((2, 4),)
    assert found.cost == 2.5
    assert {row["of"] for row in found.trace if row["phase"] == 1} == {0, 1}
    assert sum(row["removed"] for row in found.trace if row["phase"] == 0) == 2


@pytest.mark.parametrize("seed", range(20))
def test_lazy_search_is_the_search_where_nothing_gets_cheaper_and_asks_less(seed):
    draws = torch.rand(30, generator=torch.Generator().manual_seed(seed)).tolist()

    def price(partition, place):
        # What a layer adds grows with the layers that are gone and with those gone in its own window.
        gone = [sum(draws[w.low + 1 : w.high + 1]) * (w.high - w.low) for w in joined(partition, place)]
        return sum(gone) * (1 + sum(w.high > w.low for w in joined(partition, place)) / 10)

    whole, lazy = Priced(price), Priced(price)
    found = search_best_first(whole, 30, 9)
    assert search_best_first(lazy, 30, 9, lazy=True).windows == found.windows
    assert lazy.asked < whole.asked / 2


def test_a_limit_ends_the_search():
    costs = Priced(lambda partition, place: 1.0 if place else len(partition) / 10)
    found = search_best_first(costs, 5, 4, limit=0.45)
    assert (found.windows, found.cost) == ((), 0.5)
    costs = Priced(lambda partition, place: 1.0 if place else 1 - len(partition) / 10)
    found = search_best_first(costs, 5, 3, limit=0.65)
    assert (shown(found.windows), found.cost) == (((0, 2),), 0.7)
    threshold = 1 - cost_by_hand("cosine", greedy_partition(2)) + 1e-6
    method = SlidingWindowMerging(threshold=threshold, search="best_first")
    plan = method.plan(pico_model(num_hidden_layers=LAYERS), CALIBRATION)
    assert plan.outcome["removed_layers"] == 1
    with pytest.warns(UserWarning, match="merged nothing: the best similarity"):
        nothing = SlidingWindowMerging(threshold=1.0, search="best_first").plan(pico_model(), CALIBRATION)
    assert nothing.steps == ()


def greedy_partition(wanted: int) -> list[tuple[int, int]]:
    windows = greedy("cosine", wanted, 1)
    inside = {layer for low, high in windows for layer in range(low, high + 1)}
    return sorted([*windows, *((layer, layer) for layer in range(LAYERS) if layer not in inside)])


def test_a_ruinous_merger_is_passed_by_and_nothing_but_ruin_is_an_error():
    prices = [[math.inf, 0.2, math.inf], [math.inf, math.inf]]
    costs = Priced(lambda partition, place: prices[4 - len(partition)][place])
    found = search_best_first(costs, 4, 1)
    assert shown(found.windows) == ((1, 2),)
    assert [row["score"] for row in found.trace] == [None, 0.2, None]
    with pytest.raises(FloatingPointError, match="after 1 layers, hidden states are not finite.*bfloat16"):
        search_best_first(costs, 4, 2)
    model = pico_model(num_hidden_layers=LAYERS)
    replay = LayerReplay(model, [IDS])
    model.model.layers[3].mlp.down_proj.weight[0, 0] = math.inf  # whoever keeps it
    partition = in_windows(((0, 1), *((layer, layer) for layer in range(2, LAYERS))))
    asked = MergerCosts(replay, [MergeLayers(0, 0)], FlattenedCosine(), skip_last=0)
    found = asked(partition, asked.mergers(partition))
    assert [place for (place, _), cost in found.items() if math.isfinite(cost)] == [2]  # 3 gives way to 4


def fitted_cost(partition, place, way, ridge=1.0) -> float:
    """A candidate refitted with the module that fits plans, and the partition's own windows before it; by hand."""
    how = {"keep_top": "top", "keep_bottom": "bottom"}
    window = MergeLayers(partition[place].low, partition[place + 1].high, way, how[way])
    steps = tuple(w for w in (*partition[:place], window, *partition[place + 2 :]) if w.low < w.high)
    model = pico_model(num_hidden_layers=LAYERS)
    learnt = torch.cat([IDS_16[start : start + 3] for start in range(0, 16, 4)])
    # The fit holds nothing out: it is asked with a sample that is in its text anyway, and one ridge.
    plan = Plan(Base.of(model), Method("test", {}), None, steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            least_squares,
            "_portions",
            lambda samples, period: [(torch.stack(list(samples)), False), (torch.stack(list(samples)), True)],
        )
        plan = least_squares.fit_outputs(model, plan, [learnt], LeastSquares(ridge=(ridge,)))
    surgery.apply(model, plan)
    dense = pico_model(num_hidden_layers=LAYERS)
    p, q = (m(input_ids=IDS_16[3::4]).logits.double().log_softmax(-1) for m in (dense, model))
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()


IDS_16 = torch.randint(3, 512, (16, 18), generator=torch.Generator().manual_seed(3))


def refitting(**arguments) -> SlidingWindowMerging:
    return SlidingWindowMerging(
        remove_layers=3,
        consolidation="least_squares",
        search="best_first",
        similarity="kl",
        refit_candidates=True,
        **arguments,
    )


def calibration_of(ids, rank: int = 0, ranks: int = 1) -> CalibrationSet:
    text = CalibrationText(source="ids", samples=len(ids), sequence_length=18, batch_size=2)
    return CalibrationSet.from_ids(ids.tolist(), text).shard(rank, ranks)


def _search_in_one_of_two(rank: int, directory: str) -> None:
    with torch.no_grad():
        plan = refitting().plan(pico_model(num_hidden_layers=LAYERS), calibration_of(IDS_16, rank, 2))
    (Path(directory) / f"plan_{rank}.json").write_text(plan.to_json())


@pytest.mark.long
def test_two_processes_search_as_one(tmp_path):
    in_two_processes(_search_in_one_of_two, tmp_path)
    first, second = ((tmp_path / f"plan_{rank}.json").read_text() for rank in range(2))
    assert first == second
    alone = refitting().plan(pico_model(num_hidden_layers=LAYERS), calibration_of(IDS_16))
    both = Plan.from_dict(json.loads(first), "the plan")
    assert both.steps == alone.steps
    assert [row["score"] for row in both.trace] == pytest.approx([row["score"] for row in alone.trace], abs=1e-4)


def test_later_phases_go_on_with_what_was_fitted():
    plan = refitting().plan(pico_model(num_hidden_layers=LAYERS), calibration_of(IDS_16))
    phases = [[row for row in plan.trace if row["phase"] == phase] for phase in range(2)]
    (taken,) = [row for row in phases[0] if row["removed"]]
    partition = [w for w in ((n, n) for n in range(LAYERS)) if not taken["layer"] <= w[0] <= taken["high"]]
    partition = sorted([*partition, (taken["layer"], taken["high"])])
    other = {"keep_top": "top", "keep_bottom": "bottom"}
    windows = tuple(
        MergeLayers(low, high, taken["consolidation"], other[taken["consolidation"]]) for low, high in partition
    )
    above = [row for row in phases[1] if row["layer"] > taken["high"]]  # those the fitted window is below of
    for row in above:
        place = [low for low, _ in partition].index(row["layer"])
        expected = fitted_cost(windows, place, row["consolidation"], ridge=0.3)
        assert row["score"] == pytest.approx(expected, abs=1e-4)
    assert above


def test_logits_that_are_not_finite_cost_everything():
    model = pico_model(num_hidden_layers=LAYERS)
    final = model.model(input_ids=IDS).last_hidden_state
    broken = final.clone()
    broken[0, 3] = 3e38  # finite, but not what the head makes of it
    model.lm_head.weight[:] = 1.0
    value = Divergence(model).statistics(final, broken, IDS)
    assert not torch.isfinite(value[0]).any()
    assert torch.isfinite(value[1:]).all()


def test_candidates_are_refitted_before_they_are_scored():
    text = CalibrationText(source="ids", samples=16, sequence_length=18, batch_size=2)
    calibration = CalibrationSet.from_ids(IDS_16.tolist(), text)
    method = SlidingWindowMerging(
        remove_layers=2,
        consolidation="least_squares",
        search="best_first",
        similarity="kl",
        refit_candidates=True,
        least_squares=LeastSquares(ridge=(0.1, 1.0, 10.0)),
    )
    plan = method.plan(pico_model(num_hidden_layers=LAYERS), calibration)
    partition = in_windows([(layer, layer) for layer in range(LAYERS)])
    first = [row for row in plan.trace if row["phase"] == 0]
    assert len(first) == 2 * (LAYERS - 2)
    for row in first:
        expected = fitted_cost(partition, row["layer"], row["consolidation"])
        assert row["score"] == pytest.approx(expected, abs=1e-4)
    assert plan.outcome["fitted_layer_forwards"] > LAYERS
    step = plan.steps[0]
    assert (step.consolidation, step.other_parameters) in (("keep_top", "top"), ("keep_bottom", "bottom"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"similarity": "kl", "remove_layers": 2}, "no threshold.*best_first"),
        ({"similarity": "loss", "threshold": 0.5, "search": "best_first"}, "threshold is of a similarity"),
        ({"beam": 2, "remove_layers": 2}, "beam is 2; with search best_first"),
        ({"refit_candidates": True, "remove_layers": 2}, "refit_candidates is of search best_first"),
        (
            {"consolidation": "least_squares", "other_parameters": "mean", "remove_layers": 2},
            "other_parameters is 'mean'; with consolidation least_squares",
        ),
        ({"lazy": True, "remove_layers": 2}, "lazy is of search best_first"),
        (
            {
                "refit_candidates": True,
                "remove_layers": 2,
                "beam": 2,
                "search": "best_first",
                "consolidation": "least_squares",
            },
            "beam is 2; with refit_candidates",
        ),
        ({"beam": 0, "remove_layers": 2, "search": "best_first"}, "beam is 0"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        SlidingWindowMerging(**arguments)
