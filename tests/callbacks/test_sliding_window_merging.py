import functools
import itertools
import math
import random
import weakref

import pytest
import torch
import torch.multiprocessing

from callbacks import SlidingWindowMerging
from slm_pl.compression import surgery
from slm_pl.compression.calibration import LayerReplay
from slm_pl.compression.candidates import Candidates
from slm_pl.compression.plan import MergeLayers
from slm_pl.compression.scores import FlattenedCosine
from slm_pl.compression.windows import cut_windows, search_threshold, search_windows
from slm_pl.data import CalibrationText
from slm_pl.data.corpora import CalibrationSet
from slm_pl.errors import UsageError
from tests.helpers.pico import pico_model
from tests.helpers.ranks import in_two_processes

IDS = torch.randint(3, 512, (5, 24), generator=torch.Generator().manual_seed(3)).tolist()
CALIBRATION = CalibrationSet.from_ids(IDS, CalibrationText(source="ids", samples=5, sequence_length=24))


def published_search(similarity, num_layers: int, threshold: float) -> list[list[int]]:
    """The published program's loop, restated from its description: no-op tries, nothing merged when low passes 0.

    ``similarity(groups)`` is asked about the whole model: a list of groups of original layers.
    """
    groups = [[layer] for layer in range(num_layers)]
    records = []
    high, low = num_layers - 2, num_layers - 3
    while low >= 0:
        candidate = [*groups[:low], list(itertools.chain(*groups[low : high + 1])), *groups[high + 1 :]]
        if low == high or similarity(candidate) > threshold:
            low -= 1
        elif low + 1 != high:
            groups[low + 1 : high + 1] = [list(itertools.chain(*groups[low + 1 : high + 1]))]
            records.append([low + 1, high])
            high = low
        else:
            high -= 1
            low -= 1
    return records


def random_similarity(seed: int, num_layers: int):
    """A similarity that depends on the whole model, falls with the size of windows, and is not monotone in depth."""
    cost = [random.Random(seed * 1000 + layer).random() for layer in range(num_layers)]

    def of_groups(groups):
        return math.exp(-sum(cost[layer] * (len(g) - 1) / 4 for g in groups if len(g) > 1 for layer in g[:-1]))

    def of_windows(windows, low, high):
        groups = [list(range(a, b + 1)) for a, b in (*windows, (low, high))]
        return of_groups(groups)

    return of_groups, of_windows


@pytest.mark.parametrize("seed", range(30))
def test_search_decides_as_the_published_program(seed):
    num_layers = 12
    of_groups, of_windows = random_similarity(seed, num_layers)
    threshold = random.Random(seed).uniform(0.2, 0.9)
    search = search_windows(of_windows, num_layers, threshold)
    expected = published_search(of_groups, num_layers, threshold)
    found = [list(w) for w in search.windows]
    # The published program forgets a window that is still open at layer 0; ours keeps it.
    assert found[: len(expected)] == expected
    assert all(low == 0 for low, _ in found[len(expected) :])
    assert not any(low == high for low, high in found)
    assert all(t.low < t.high for t in search.tries)  # no no-op tries
    assert all(t.accepted == (t.similarity > threshold) for t in search.tries)
    assert search.lower <= threshold < search.upper


def test_window_open_at_layer_zero_is_committed():
    search = search_windows(lambda windows, low, high: 0.9, 5, threshold=0.5)
    assert search.windows == ((0, 3),)
    assert search_windows(lambda windows, low, high: 0.9, 5, threshold=0.5, skip_last=0).windows == ((0, 4),)


def test_threshold_is_strict():
    assert search_windows(lambda windows, low, high: 0.5, 5, threshold=0.5).windows == ()


def noisy_similarity(seed: int, num_layers: int, noise: float):
    """As :func:`random_similarity`, but the number of layers removed no longer falls evenly with the threshold."""
    _, smooth = random_similarity(seed, num_layers)

    @functools.cache
    def similarity(windows, low, high):
        return smooth(windows, low, high) * (1 - noise * random.Random(f"{seed} {windows} {low} {high}").random())

    return similarity


def all_thresholds(score, num_layers: int) -> list[tuple[float, int]]:
    """One threshold of every interval in which the search goes the same way, and what it removes."""
    found, threshold = [], 1.0
    while threshold >= -1:
        search = search_windows(score, num_layers, threshold)
        found.append((threshold, search.removed))
        threshold = math.nextafter(search.lower, -2)
    return found


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("seed", range(10))
def test_wanted_number_of_layers_is_met_exactly(seed, noise):
    num_layers, cuts = 10, 0
    score = noisy_similarity(seed, num_layers, noise)
    possible = {removed for _, removed in all_thresholds(score, num_layers)}
    for wanted in range(1, num_layers - 1):
        search, threshold, _ = search_threshold(score, num_layers, wanted)
        windows = cut_windows(search.windows, wanted)
        assert sum(high - low for low, high in windows) == wanted
        layers = [layer for low, high in windows for layer in range(low, high + 1)]
        assert len(layers) == len(set(layers))
        assert max(layers) <= num_layers - 2
        # Cut exactly where no threshold at all gives as many.
        assert (windows == search.windows) == (wanted in possible)
        cuts += windows != search.windows
        if windows == search.windows:
            # The threshold in the plan really gives these windows, and so does all of its interval.
            for t in (threshold, search.lower, math.nextafter(search.upper, -1)):
                assert search_windows(score, num_layers, t).windows == windows
    assert noise or not cuts


def test_where_no_threshold_fits_the_last_window_is_cut():
    # Merging two layers looks as bad as merging all: nothing lies between 0 and 4 removed layers.
    search, threshold, _ = search_threshold(lambda windows, low, high: 0.5, 6, wanted=2)
    assert threshold < 0.5
    assert search.removed > 2
    assert cut_windows(search.windows, 2) == ((2, 4),)


def test_search_ends_where_every_similarity_is_one():
    # Identity layers: every try is accepted at any threshold below 1, and none at 1.
    search, _, _ = search_threshold(lambda windows, low, high: 1.0, 6, wanted=2)
    assert cut_windows(search.windows, 2) == ((2, 4),)


def test_cut_gives_back_what_joined_last():
    assert cut_windows(((7, 10), (2, 5)), 4) == ((7, 10), (4, 5))
    assert cut_windows(((7, 10), (2, 5)), 3) == ((7, 10),)
    assert cut_windows(((7, 10), (2, 5)), 1) == ((9, 10),)


def brute_force(
    model_seed: int, threshold: float, other_parameters: str, consolidation: str = "keep_top", compare=None
) -> list[tuple[int, int]]:
    """The same search with a freshly built, really merged model and a full forward for every try."""
    ids = torch.tensor(IDS)
    with torch.inference_mode():
        dense = pico_model(seed=model_seed)(input_ids=ids, output_hidden_states=True).hidden_states[-1]

    def similarity(windows, low, high):
        model = pico_model(seed=model_seed)
        steps = [MergeLayers(a, b, consolidation, other_parameters) for a, b in (*windows, (low, high))]
        from tests.slm_pl.compression.test_surgery import plan_for

        surgery.apply(model, plan_for(model, *steps))
        with torch.inference_mode():
            merged = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        if compare is not None:
            return compare(dense, merged)
        return (
            sum(torch.cosine_similarity(a.flatten(), b.flatten(), 0).item() for a, b in zip(dense, merged, strict=True))
            / 5
        )

    return list(search_windows(similarity, 6, threshold).windows)


@pytest.mark.parametrize("other_parameters", ["top", "bottom"])
@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.6])
def test_plan_equals_a_search_with_really_merged_models(other_parameters, threshold):
    model = pico_model(seed=5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = SlidingWindowMerging(threshold=threshold, other_parameters=other_parameters).plan(model, CALIBRATION)
    assert [(s.low, s.high) for s in plan.steps] == brute_force(5, threshold, other_parameters)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # it decides and never mutates


@pytest.mark.parametrize("consolidation", ["keep_bottom", "sum", "mean"])
@pytest.mark.parametrize("other_parameters", ["top", "bottom", "mean"])
def test_every_consolidation_is_searched_as_it_will_be_merged(consolidation, other_parameters):
    """Several windows, so that settled ones are merged again while another grows."""
    windows = set()
    for threshold in (0.2, 0.35, 0.5):
        method = SlidingWindowMerging(threshold, consolidation=consolidation, other_parameters=other_parameters)
        plan = method.plan(pico_model(seed=5), CALIBRATION)
        assert [(s.low, s.high) for s in plan.steps] == brute_force(5, threshold, other_parameters, consolidation)
        assert all((s.consolidation, s.other_parameters) == (consolidation, other_parameters) for s in plan.steps)
        windows.add(tuple((s.low, s.high) for s in plan.steps))
    assert len(windows) > 1


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_search_by_cka_decides_as_one_with_really_merged_models(kernel):
    from tests.slm_pl.compression.test_scores import hsic_of_song, kernel_matrix

    def cka(dense, merged):
        sums = torch.zeros(3)
        for a, b in zip(dense.double(), merged.double(), strict=True):
            k, other = kernel_matrix(a, kernel), kernel_matrix(b, kernel)
            sums += torch.tensor([hsic_of_song(k, other), hsic_of_song(k, k), hsic_of_song(other, other)])
        return (sums[0] / (sums[1] * sums[2]).sqrt()).item()

    method = SlidingWindowMerging(threshold=0.5, similarity="cka", kernel=kernel)
    plan = method.plan(pico_model(seed=5), CALIBRATION)
    assert [(s.low, s.high) for s in plan.steps] == brute_force(5, 0.5, "top", compare=cka)
    assert plan.steps
    cosine = SlidingWindowMerging(threshold=0.5).plan(pico_model(seed=5), CALIBRATION)
    assert [t["similarity"] for t in cosine.trace][:3] != [t["similarity"] for t in plan.trace][:3]


def test_kernel_without_cka_is_refused():
    with pytest.raises(UsageError, match="kernel is 'rbf', but similarity 'cosine' has no kernel. Set similarity: cka"):
        SlidingWindowMerging(threshold=0.5, kernel="rbf")


def test_two_merged_layers_at_most_are_in_memory(monkeypatch):
    """The one that grows, and a settled one while it is run, with however many windows."""
    alive, most = weakref.WeakSet(), [0]

    class Watched(surgery.MergedLayer):
        __hash__ = object.__hash__

        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)

        def __call__(self, hidden, **kwargs):
            most[0] = max(most[0], len(alive))
            return super().__call__(hidden, **kwargs)

    monkeypatch.setattr(surgery, "MergedLayer", Watched)
    replay = LayerReplay(pico_model(num_hidden_layers=14), CALIBRATION)
    how = ("mean", "mean", FlattenedCosine(), lambda text: None)
    candidates = Candidates(replay, *how)
    candidates.score(((11, 12), (8, 10), (5, 6)), 2, 3)
    candidates.score(((11, 12), (8, 10), (5, 6)), 1, 3)
    # One is described while it runs; the sums of the one that grows are kept beside it.
    assert most == [1]
    assert len(candidates._growing._merged) == len(list(replay.layers[0].parameters()))


def test_samples_too_short_for_cka_are_refused_by_every_rank_alike():
    ids = [IDS[0], IDS[1][:3], IDS[2]]
    calibration = CalibrationSet.from_ids(ids, CalibrationText(source="ids", samples=3, sequence_length=24))
    for rank in (0, 1):  # only one of the two holds the short sample
        with pytest.raises(UsageError, match="at least 4 tokens; the shortest calibration sample has 3"):
            SlidingWindowMerging(threshold=0.5, similarity="cka").plan(pico_model(), calibration.shard(rank, 2))


def test_layer_forwards_are_the_minimum():
    plan = SlidingWindowMerging(threshold=0.4).plan(pico_model(seed=5), CALIBRATION)
    expected = 6  # the dense pass
    windows = sorted(((s.low, s.high) for s in plan.steps), reverse=True)
    for t in plan.trace:
        above = [w for w in windows if w[0] > t["high"]]
        expected += 1 + (6 - 1 - t["high"]) - sum(high - low for low, high in above)
    assert plan.outcome["layer_forwards"] == expected


def test_trace_holds_every_try_of_every_search():
    plan = SlidingWindowMerging(remove_layers=2).plan(pico_model(seed=5), CALIBRATION)
    searches = plan.outcome["searches"]
    assert {t["search"] for t in plan.trace} == set(range(len(searches)))
    for t in plan.trace:
        assert t["accepted"] == (t["similarity"] > searches[t["search"]]["threshold"])
    final = searches[plan.outcome["search"]]
    assert (final["threshold"], final["removed_layers"], final["stopped"]) == (plan.outcome["threshold"], 2, None)


def test_same_inputs_same_plan_byte_for_byte():
    plans = [SlidingWindowMerging(remove_layers=2).plan(pico_model(seed=5), CALIBRATION).to_json() for _ in range(2)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("size", [1, 3, 10])
@pytest.mark.parametrize("variant", [{}, {"consolidation": "sum"}, {"similarity": "cka"}])
def test_batch_size_does_not_change_the_decision(size, variant):
    ids = torch.randint(3, 512, (10, 24), generator=torch.Generator().manual_seed(4)).tolist()

    def plan(batch_size):
        text = CalibrationText(source="ids", samples=10, sequence_length=24, batch_size=batch_size)
        return SlidingWindowMerging(remove_layers=3, **variant).plan(
            pico_model(seed=5), CalibrationSet.from_ids(ids, text)
        )

    found, one = plan(size), plan(1)
    assert found.steps == one.steps
    decisions = [[(t["low"], t["high"], t["accepted"], t["search"]) for t in p.trace] for p in (found, one)]
    assert decisions[0] == decisions[1]
    assert [t["similarity"] for t in found.trace] == pytest.approx([t["similarity"] for t in one.trace], abs=1e-6)


@pytest.mark.parametrize("wanted", [1, 2, 3, 4])
def test_remove_layers_and_ratio_give_the_size(wanted):
    model = pico_model(seed=5)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    by_ratio = SlidingWindowMerging(ratio=(wanted + 0.3) * layer / total).plan(model, CALIBRATION)
    by_count = SlidingWindowMerging(remove_layers=wanted).plan(model, CALIBRATION)
    assert by_ratio.steps == by_count.steps
    surgery.apply(model, by_count)
    assert sum(p.numel() for p in model.parameters()) == total - wanted * layer
    assert by_count.outcome["removed_layers"] == wanted


def test_nothing_merged_names_the_best_similarity():
    model = pico_model(seed=5)
    with pytest.warns(UserWarning, match=r"merged nothing: the best similarity seen is 0\.\d{4}, the threshold 1"):
        plan = SlidingWindowMerging(threshold=1.0).plan(model, CALIBRATION)
    assert plan.steps == ()
    best = max(t["similarity"] for t in plan.trace)
    with pytest.warns(UserWarning, match=f"{best:.4f}"):
        SlidingWindowMerging(threshold=1.0).plan(model, CALIBRATION)


def test_too_many_layers_say_what_is_possible():
    with pytest.raises(UsageError, match="ratio 0.9 means .* 1 to 4 layers can be removed"):
        SlidingWindowMerging(ratio=0.9).plan(pico_model(), CALIBRATION)
    with pytest.raises(UsageError, match="no window of two layers fits"):
        SlidingWindowMerging(remove_layers=1, skip_last=5).plan(pico_model(), CALIBRATION)


def test_non_finite_states_stop_the_search():
    model = pico_model()
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"On calibration sample 0, layer 4 of the dense model .*bfloat16"):
        SlidingWindowMerging(threshold=0.5).plan(model, CALIBRATION)


VARIANTS = [{}, {"consolidation": "mean", "other_parameters": "mean"}, {"similarity": "cka", "consolidation": "sum"}]


def _rank(rank: int, directory: str) -> None:
    # With one sample, one of the two ranks has nothing to score.
    one = CalibrationSet.from_ids(IDS[:1], CalibrationText(source="ids", samples=1, sequence_length=24))
    SlidingWindowMerging(remove_layers=2).plan(pico_model(seed=5), one.shard(rank, 2)).save(
        f"{directory}/few{rank}.json"
    )
    for number, variant in enumerate(VARIANTS):
        plan = SlidingWindowMerging(remove_layers=3, **variant).plan(pico_model(seed=5), CALIBRATION.shard(rank, 2))
        plan.save(f"{directory}/{number}.{rank}.json")
    # Sample 3 is the second of rank 1; both ranks must hear of it.
    ids = torch.tensor(IDS)
    ids[ids == 511], ids[3, 5] = 510, 511
    model = pico_model(seed=5)
    with torch.no_grad():
        model.model.embed_tokens.weight[511] = float("nan")
    faulty = CalibrationSet.from_ids(ids.tolist(), CALIBRATION.text).shard(rank, 2)
    try:
        SlidingWindowMerging(remove_layers=3).plan(model, faulty)
    except FloatingPointError as error:
        with open(f"{directory}/error{rank}", "w") as file:
            file.write(str(error))


def test_two_processes_share_the_work_and_end_with_the_plan_of_one(tmp_path):
    in_two_processes(_rank, tmp_path)
    assert (tmp_path / "few0.json").read_text() == (tmp_path / "few1.json").read_text()
    for number, variant in enumerate(VARIANTS):
        one = SlidingWindowMerging(remove_layers=3, **variant).plan(pico_model(seed=5), CALIBRATION).file_text
        texts = [(tmp_path / f"{number}.{rank}.json").read_text() for rank in (0, 1)]
        assert texts == [one, one]
    for rank in (0, 1):
        assert (tmp_path / f"error{rank}").read_text().startswith("On calibration sample 3, the embeddings")
