"""SLEB, Shortened LLaMA, block influence and designated layers, against computations of their own."""

import itertools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from callbacks import SLEB, BlockInfluence, LayerRemoval, ShortenedLLaMA
from slm_pl.compression.plan import DropLayers, Plan
from slm_pl.data import AlpacaDataModule, CalibrationSet, CalibrationText
from slm_pl.errors import UsageError
from tests.helpers.pico import pico_model
from tests.helpers.ranks import in_two_processes
from tests.helpers.run import Drop, alpaca_data, make_module, make_trainer, without

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(3, 512, (4, 24), generator=torch.Generator().manual_seed(1))
CALIBRATION = CalibrationSet.from_ids(IDS.tolist(), CalibrationText(source="ids", samples=4, sequence_length=24))
CONTROLLED = [SLEB, ShortenedLLaMA, BlockInfluence]


def model_of_ten() -> torch.nn.Module:
    return pico_model(num_hidden_layers=10)


@torch.no_grad()
def loss(gone: set[int]) -> float:
    """Of a model of ten without these layers, made by hand."""
    model = model_of_ten()
    model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i not in gone)
    logits = model(input_ids=IDS, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), IDS[:, 1:].flatten()).item()


def greedy(wanted: int, candidates: list[int]) -> tuple[list[int], list[dict[int, float]]]:
    gone: list[int] = []
    phases = []
    for _ in range(wanted):
        phases.append({c: loss({*gone, c}) for c in candidates if c not in gone})
        gone.append(min(phases[-1], key=phases[-1].__getitem__))
    return gone, phases


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():  # as the lifecycle lends the model
        yield


@pytest.mark.parametrize("protect", [(1, 1), (3, 2)])
def test_sleb_is_greedy_on_the_model_pruned_so_far(protect):
    order, phases = greedy(3, list(range(protect[0], 10 - protect[1])))
    plan = SLEB(3, protect_first=protect[0], protect_last=protect[1]).plan(model_of_ten(), CALIBRATION)
    assert plan.outcome["order"] == order
    assert plan.steps == (DropLayers(tuple(sorted(order))),)
    for number, phase in enumerate(phases):
        rows = [row for row in plan.trace if row["phase"] == number]
        assert {row["layer"]: row["score"] for row in rows} == {k: pytest.approx(v, rel=1e-6) for k, v in phase.items()}
        assert [row["layer"] for row in rows if row["removed"]] == [order[number]]
    assert plan.outcome["dense_score"] == pytest.approx(loss(set()), rel=1e-6)


def test_sleb_is_not_the_one_shot_order():
    """Otherwise the greedy test above would show nothing."""
    first = greedy(1, list(range(1, 9)))[1][0]
    assert sorted(first, key=first.__getitem__)[:3] != greedy(3, list(range(1, 9)))[0]


def test_of_equals_the_lowest_goes():
    model = model_of_ten()
    for layer in model.model.layers[4:8]:  # they do nothing: removing one or another gives the same model
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    plan = SLEB(2, protect_first=4, protect_last=2).plan(model, CALIBRATION)
    assert len({row["score"] for row in plan.trace}) == 1
    assert plan.outcome["order"] == [4, 5]


def test_perplexity_without_each_layer():
    plan = ShortenedLLaMA("perplexity", 3, protect_first=2, protect_last=1).plan(model_of_ten(), CALIBRATION)
    expected = {layer: math.exp(loss({layer})) for layer in range(10)}
    assert {row["layer"]: row["score"] for row in plan.trace} == {
        k: pytest.approx(v, rel=1e-6) for k, v in expected.items()
    }
    assert [row["layer"] for row in plan.trace if row["protected"]] == [0, 1, 9]
    assert plan.outcome["order"] == sorted(range(2, 9), key=expected.__getitem__)[:3]
    assert plan.outcome["layer_forwards"] == 10 + 9 + 45
    # The same with a layer at a time is SLEB's search.
    one_by_one = ShortenedLLaMA("perplexity", 3, protect_first=2, protect_last=1, one_shot=False)
    plan = one_by_one.plan(model_of_ten(), CALIBRATION)
    assert plan.outcome["order"] == greedy(3, list(range(2, 9)))[0]
    counts = [sum(row["phase"] == phase for row in plan.trace) for phase in range(3)]
    assert counts == [10, 6, 5]  # later phases leave the protected ones out


@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
def test_importance_of_weights_is_the_sum_over_the_tensors(criterion):
    model = model_of_ten()
    plan = ShortenedLLaMA(criterion, 3, protect_first=1, protect_last=0).plan(model, CALIBRATION)
    with torch.enable_grad():
        logits = model(input_ids=IDS, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for row, layer in zip(plan.trace, model.model.layers, strict=True):
        parts = {
            n: (p * p.grad if criterion == "taylor" else p).abs().sum().item() for n, p in layer.named_parameters()
        }
        assert row["tensors"] == {n: pytest.approx(v, rel=1e-4) for n, v in parts.items()}
        assert row["score"] == pytest.approx(sum(parts.values()), rel=1e-4)
    scores = [row["score"] for row in plan.trace]
    assert plan.outcome["order"] == sorted(range(1, 10), key=scores.__getitem__)[:3]
    assert (plan.calibration is None) == (criterion == "magnitude")


def test_taylor_one_by_one_scores_what_is_left():
    options = {"criterion": "taylor", "protect_first": 0, "protect_last": 0}
    plan = ShortenedLLaMA(remove_layers=3, one_shot=False, **options).plan(model_of_ten(), CALIBRATION)
    gone: list[int] = []
    for phase in range(3):
        model = model_of_ten()
        left = [i for i in range(10) if i not in gone]
        model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in left)
        once = ShortenedLLaMA(remove_layers=1, **options)
        model.config.num_hidden_layers = len(left)
        again = once.plan(model, CALIBRATION)
        rows = [row for row in plan.trace if row["phase"] == phase]
        assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in again.trace], rel=1e-5)
        gone.append(left[again.outcome["order"][0]])
    assert plan.outcome["order"] == gone


def test_block_influence_takes_the_layers_that_turn_tokens_least():
    model = model_of_ten()
    states: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, args: states.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda m, args: states.append(args[0]))
    model(input_ids=IDS)
    model = model_of_ten()
    plan = BlockInfluence(remove_layers=3).plan(model, CALIBRATION)
    expected = []
    for before, after in itertools.pairwise(states):
        cosines = [a @ b / (a.norm() * b.norm()) for a, b in zip(before.view(-1, 32), after.view(-1, 32), strict=True)]
        expected.append(1 - torch.stack(cosines).mean().item())
    assert [row["score"] for row in plan.trace] == pytest.approx(expected, abs=1e-6)
    assert plan.outcome["order"] == sorted(range(10), key=expected.__getitem__)[:3]

    plan = BlockInfluence("angular", 4).plan(model, CALIBRATION)
    expected = []
    for low in range(7):
        before, after = states[low][:, -1], states[low + 4][:, -1]
        angles = [math.acos((a @ b / (a.norm() * b.norm())).item()) for a, b in zip(before, after, strict=True)]
        expected.append(sum(angles) / 4 / math.pi)
    assert [row["score"] for row in plan.trace] == pytest.approx(expected, abs=1e-6)
    start = expected.index(min(expected))
    assert [(row["layer"], row["high"]) for row in plan.trace if row["removed"]] == [(start, start + 3)]
    assert plan.steps == (DropLayers(tuple(range(start, start + 4))),)


def test_memory_is_no_part_of_the_decision():
    """The same plan on a machine that has less, byte for byte where the chunks are the same."""
    plans = [SLEB(2, memory_budget=budget).plan(model_of_ten(), CALIBRATION) for budget in (1.0, 2.0)]
    assert plans[0].to_json() == plans[1].to_json()
    assert "memory_budget" not in plans[0].method.init_args


def test_designated_layers_reverse_and_random():
    model = model_of_ten()

    def order(**options):
        return LayerRemoval(**options).plan(model, CALIBRATION).outcome["order"]

    plan = LayerRemoval(layers=[7, 2, 5]).plan(model, CALIBRATION)
    assert plan.steps == (DropLayers((2, 5, 7)),)
    assert plan.outcome["order"] == [7, 2, 5]
    assert order(order="reverse", remove_layers=3) == [8, 7, 6]
    assert order(order="reverse", remove_layers=3, protect_last=0) == [9, 8, 7]
    drawn = [order(order="random", remove_layers=3, seed=seed) for seed in range(200)]
    assert drawn == [order(order="random", remove_layers=3, seed=seed) for seed in range(200)]
    assert {layer for layers in drawn for layer in layers} == set(range(9))
    assert all(len(set(layers)) == 3 for layers in drawn)
    frequency = [sum(layer in layers for layers in drawn) for layer in range(9)]
    assert min(frequency) > 40  # 67 are expected
    # A larger draw begins with the smaller one, so that sizes compare.
    assert order(order="random", remove_layers=5)[:3] == order(order="random", remove_layers=3)


@pytest.mark.parametrize("method", CONTROLLED)
def test_ratio_is_of_all_parameters_to_the_nearest_layer(method):
    model = model_of_ten()
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    options = {} if method is BlockInfluence else {"protect_first": 1, "protect_last": 1}
    by_ratio = method(ratio=2.4 * layer / total, **options).plan(model, CALIBRATION)
    assert by_ratio.steps == method(remove_layers=2, **options).plan(model, CALIBRATION).steps


@pytest.mark.parametrize("method", CONTROLLED)
def test_how_many_is_told_clearly(method):
    name = method.__name__
    with pytest.raises(UsageError, match=f"{name} got none of remove_layers and ratio; give exactly one of"):
        method()
    with pytest.raises(UsageError, match=f"{name} got remove_layers=2 and ratio=0.2; give exactly one"):
        method(remove_layers=2, ratio=0.2)
    with pytest.raises(UsageError, match="remove_layers is 0; give at least 1"):
        method(remove_layers=0)
    with pytest.raises(UsageError, match="ratio is 20.0; it is a share of all parameters"):
        method(ratio=20.0)
    assert method(plan_path="some/plan.json").arguments()["remove_layers"] is None
    most = {"SLEB": 8, "ShortenedLLaMA": 4, "BlockInfluence": 9}[name]
    with pytest.raises(
        UsageError, match=rf"remove_layers is {most + 1}, the model has 10 layers; .* 1 to {most} layers"
    ):
        method(remove_layers=most + 1).plan(model_of_ten(), CALIBRATION)
    assert len(method(remove_layers=most).plan(model_of_ten(), CALIBRATION).steps[0].layers) == most


def test_protection_that_leaves_nothing_is_told():
    with pytest.raises(
        UsageError, match="has 6 layers; with protect_first 4 and protect_last 2, all of them stay. Low"
    ):
        ShortenedLLaMA(remove_layers=1).plan(pico_model(), CALIBRATION)
    with pytest.raises(UsageError, match="1 to 5 layers can be removed"):  # one has to stay
        SLEB(remove_layers=6, protect_first=0, protect_last=0).plan(pico_model(), CALIBRATION)
    with pytest.raises(UsageError, match="protect_first is -1"):
        SLEB(remove_layers=1, protect_first=-1)
    with pytest.raises(UsageError, match="protect_last is -2"):
        ShortenedLLaMA(remove_layers=1, protect_last=-2)
    with pytest.raises(UsageError, match="memory_budget is 0"):
        SLEB(remove_layers=1, memory_budget=0)
    for budget in (math.nan, math.inf):
        with pytest.raises(UsageError, match=f"memory_budget is {budget}"):
            SLEB(remove_layers=1, memory_budget=budget)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "entropy"}, "criterion is 'entropy'; allowed are perplexity, taylor and magnitude"),
        ({"criterion": "taylor", "norm_power": 3}, "norm_power is 3; allowed are 1 and 2"),
        ({"norm_power": 2}, "criterion perplexity has none"),
        ({"criterion": "magnitude", "per_sample": True}, "per_sample is of criterion taylor; criterion is magnitude"),
        (
            {"criterion": "taylor", "memory_budget": 1.0},
            "memory_budget is of criterion perplexity; criterion is taylor",
        ),
        ({"memory_budget": 0.0}, "memory_budget is 0.0; give a positive number of GiB"),
    ],
)
def test_arguments_without_a_meaning_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ShortenedLLaMA(remove_layers=1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got neither layers nor order"),
        ({"layers": []}, r"layers names \[\]; give each layer to remove once"),
        ({"layers": [3, 1, 3]}, r"layers names \[3\] more than once"),
        ({"layers": [3], "protect_last": 2}, "protect_first and protect_last are of order"),
        ({"layers": [3], "seed": 2}, "seed is 2, but only order random draws"),
        ({"order": "reverse", "remove_layers": 1, "seed": 2}, "seed is 2, but only order random draws"),
        ({"layers": [-1]}, r"layers names \[-1\]; give each layer to remove once, numbered from 0"),
        ({"layers": [1], "order": "random"}, "give one of them"),
        ({"layers": [1], "remove_layers": 2}, "give order, reverse or random"),
        ({"remove_layers": 2}, "give order, reverse or random"),
        ({"order": "random"}, "none of remove_layers and ratio"),
        ({"order": "forward", "remove_layers": 2}, "order is 'forward'; allowed are reverse and random"),
    ],
)
def test_designated_layers_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        LayerRemoval(**options)


def test_designated_layers_the_model_does_not_have():
    with pytest.raises(UsageError, match=r"layers names \[10, 12\]; this model has the layers 0 to 9"):
        LayerRemoval(layers=[3, 10, 12]).plan(model_of_ten(), CALIBRATION)
    with pytest.raises(UsageError, match="names all 10 layers of this model. Keep at least one"):
        LayerRemoval(layers=list(range(10))).plan(model_of_ten(), CALIBRATION)
    with pytest.raises(UsageError, match=r"remove_layers is 10, .* 1 to 9 layers"):
        LayerRemoval(order="reverse", remove_layers=10).plan(model_of_ten(), CALIBRATION)


def test_a_method_without_data_reads_none(pico_dir, tmp_path, monkeypatch):
    """A calibration text that cannot be read does not matter to magnitudes or designated layers; a run shows."""

    def unread(self):
        raise AssertionError("calibration text was read")

    monkeypatch.setattr(AlpacaDataModule, "calibration_batches", unread)
    for method in (
        LayerRemoval(layers=[2]),
        ShortenedLLaMA("magnitude", 1, protect_first=1, protect_last=1),
    ):
        run = tmp_path / type(method).__name__
        make_trainer(run, method).test(make_module(pico_dir), alpaca_data(run), verbose=False)
        assert json.loads((run / "plan.json").read_text())["calibration"] is None
    with pytest.raises(AssertionError, match="was read"):
        make_trainer(tmp_path / "sleb", SLEB(1)).test(make_module(pico_dir), alpaca_data(tmp_path), verbose=False)


def test_from_search_to_a_pruned_model_with_its_picture(pico_dir, tmp_path):
    from callbacks import ExportCheckpoint

    export = tmp_path / "export"
    module = make_module(pico_dir)
    make_trainer(tmp_path / "run", SLEB(2), ExportCheckpoint(str(export))).prune(module, alpaca_data(tmp_path))
    plan = Plan.load(export / "plan.json")
    stock = AutoModelForCausalLM.from_pretrained(export).eval()
    expected = without(pico_dir, *plan.steps[0].layers).eval()
    torch.testing.assert_close(stock(IDS).logits, expected(IDS).logits, rtol=0, atol=1e-6)
    picture = (tmp_path / "run" / "block_importance.png").read_bytes()
    assert (export / "block_importance.png").read_bytes() == picture
    assert "![The score of every layer](block_importance.png)" in (export / "README.md").read_text()
    assert not (export / "search_trace.png").exists()
    # A later run of a method that draws nothing leaves no picture of a plan that is no more.
    make_trainer(tmp_path / "run", Drop([1]), overwrite=True).prune(make_module(pico_dir), alpaca_data(tmp_path))
    assert not (tmp_path / "run" / "block_importance.png").exists()


VARIANTS = [
    lambda: SLEB(2),
    lambda: ShortenedLLaMA("perplexity", 2, protect_first=1),
    lambda: ShortenedLLaMA("taylor", 2, protect_first=1),
    lambda: ShortenedLLaMA("taylor", 2, protect_first=1, per_sample=True, one_shot=False),
    lambda: BlockInfluence("cosine", 2),
    lambda: BlockInfluence("angular", 2),
    lambda: LayerRemoval(order="random", remove_layers=2),
]


def _rank(rank: int, directory: str) -> None:
    one = CalibrationSet.from_ids(IDS[:1].tolist(), CalibrationText(source="ids", samples=1, sequence_length=24))
    with torch.no_grad():
        for number, make in enumerate(VARIANTS):
            make().plan(model_of_ten(), CALIBRATION.shard(rank, 2)).save(f"{directory}/{number}.{rank}.json")
            # With one sample, one of the two ranks has nothing to score.
            make().plan(model_of_ten(), one.shard(rank, 2)).save(f"{directory}/few{number}.{rank}.json")
        ids = IDS.clone()
        ids[ids == 511], ids[3, 5] = 510, 511
        model = model_of_ten()
        model.model.embed_tokens.weight[511] = float("nan")
        faulty = CalibrationSet.from_ids(ids.tolist(), CALIBRATION.text).shard(rank, 2)
        for number, make in enumerate(VARIANTS[:-1]):  # the last looks at nothing
            try:
                make().plan(model, faulty)
            except FloatingPointError as error:
                with open(f"{directory}/error{number}.{rank}", "w") as file:
                    file.write(str(error))


def test_two_processes_share_the_work_and_decide_as_one(tmp_path):
    in_two_processes(_rank, tmp_path)
    for number, make in enumerate(VARIANTS):
        for name in (f"{number}", f"few{number}"):
            texts = [(tmp_path / f"{name}.{rank}.json").read_text() for rank in (0, 1)]
            assert texts[0] == texts[1]
        found, one = Plan.load(tmp_path / f"{number}.0.json"), make().plan(model_of_ten(), CALIBRATION)
        assert found.steps == one.steps
        assert found.calibration == one.calibration
        keys = ("phase", "layer", "removed")
        assert [[row[k] for k in keys] for row in found.trace] == [[row[k] for k in keys] for row in one.trace]
        assert [row["score"] for row in found.trace] == pytest.approx([row["score"] for row in one.trace], rel=1e-5)
    for number in range(len(VARIANTS) - 1):
        messages = {(tmp_path / f"error{number}.{rank}").read_text() for rank in (0, 1)}
        assert len(messages) == 1
        assert "nothing can be compared" in messages.pop()
    assert (tmp_path / "error0.0").read_text().startswith("On calibration sample 3, the dense model")
