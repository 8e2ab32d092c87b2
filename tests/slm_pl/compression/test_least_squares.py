"""The streamed fit against one that is computed at once, with everything in memory."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from slm_pl.compression import least_squares, surgery
from slm_pl.compression.architecture import ARCHITECTURES, decoder_layers
from slm_pl.compression.least_squares import LeastSquares, count_fits, fit_outputs
from slm_pl.compression.plan import Base, DropLayers, MergeLayers, Method, Plan, RefitOutput
from slm_pl.compression.spans import Span, spans
from slm_pl.errors import UsageError
from slm_pl.memory import TensorBytes
from tests.helpers.pico import pico_model
from tests.helpers.ranks import in_two_processes

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(3, 512, (24, 20), generator=torch.Generator().manual_seed(1))
HELD_OUT = IDS[5::6]
FITTED = torch.cat([IDS[start : start + 5] for start in range(0, 24, 6)])
ONE = LeastSquares(ridge=(3.0,), held_out=1 / 6)
# Where the map is that the MLP writes with, and the norm of what it writes.
MAPS = {"gpt_neox": "mlp.dense_4h_to_h", "bloom": "mlp.dense_4h_to_h", "opt": "fc2", "mixtral": "self_attn.o_proj"}
NORMS = {
    "gemma2": "post_feedforward_layernorm",
    "gemma3_text": "post_feedforward_layernorm",
    "glm4": "post_mlp_layernorm",
    "olmo2": "post_feedforward_layernorm",
}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def plan_for(model, *steps) -> Plan:
    return Plan(Base.of(model), Method("test", {}), None, steps)


def states_behind(model, ids) -> list[torch.Tensor]:
    """The hidden state before the first layer and behind each layer, of the model as it is."""
    found: list[torch.Tensor] = []
    layers = decoder_layers(model)

    def before(module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])

    def behind(module, args, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(behind) for layer in layers]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def without(model_type: str, gone: list[int]):
    model = pico_model(model_type)
    surgery.apply(model, plan_for(model, DropLayers(tuple(gone))))
    return model


def map_of(model_type: str, layer: nn.Module) -> nn.Linear:
    return layer.get_submodule(MAPS.get(model_type, "mlp.down_proj"))


def solved_at_once(model_type: str, layer: int, gone: list[int], ridge: float, pruned: nn.Module) -> nn.Module:
    """Fits the layer below the gap with a dense least-squares solver on the stacked system; the layer, fitted."""
    target = states_behind(pico_model(model_type), FITTED)[max(gone) + 1].double()
    host = decoder_layers(pruned)[layer]
    written = map_of(model_type, host)
    inputs: list[torch.Tensor] = []
    hook = written.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    result = states_behind(pruned, FITTED)[layer + 1].double()
    hook.remove()
    seen = inputs[0].view(*FITTED.shape, -1).double()
    gain = torch.full((32,), 0.7 if model_type == "granite" else 1.0, dtype=torch.float64)
    if written.bias is not None:
        seen = torch.cat([seen, torch.ones_like(seen[..., :1])], -1)
    if model_type in NORMS:
        norm = host.get_submodule(NORMS[model_type])
        scale = norm.weight.double() + (1 if model_type.startswith("gemma") else 0)
        weight = torch.cat([written.weight, written.bias[:, None]], 1) if written.bias is not None else written.weight
        root = (seen @ weight.T.double()).square().mean(-1, keepdim=True).sqrt()
        seen, gain = seen / root, scale
    roots = 1 / target.norm(dim=-1, keepdim=True)
    rows, wanted = (seen * roots).flatten(0, 1), ((target - result) / gain * roots).flatten(0, 1)
    penalty = torch.full((rows.shape[1],), ridge * rows[:, : written.in_features].square().sum(0).mean().item())
    penalty[written.in_features :] = 0  # of the bias
    stacked = torch.cat([rows, penalty.double().sqrt().diag()])
    zeros = torch.zeros(rows.shape[1], 32, dtype=torch.float64)
    change = torch.linalg.lstsq(stacked, torch.cat([wanted, zeros]), driver="gelsd").solution.T
    written.weight += change[:, : written.in_features].float()
    if written.bias is not None:
        written.bias += change[:, -1].float()
    return host


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_streamed_fit_is_the_dense_solve(model_type, monkeypatch):
    monkeypatch.setattr(least_squares, "CHUNK", 60)  # three samples at a time
    model = pico_model(model_type)
    gone = [4] if model_type == "qwen3_moe" else [3, 4]
    host = gone[0] - 1
    before = {name: p.clone() for name, p in model.named_parameters()}
    plan = fit_outputs(model, plan_for(model, DropLayers(tuple(gone))), IDS.split(7), ONE)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    (row,) = plan.outcome["least_squares"]["fits"]
    assert (row["layer"], row["low"], row["high"], row["ridge"]) == (host, host, gone[-1], 3.0)
    assert row["group"] == ("attention" if model_type == "mixtral" else "mlp")
    pruned = without(model_type, gone)
    unfitted = error_of(states_behind(pruned, HELD_OUT)[host + 1], model_type, gone[-1])
    expected = map_of(model_type, solved_at_once(model_type, host, gone, 3.0, pruned))
    fitted = error_of(states_behind(pruned, HELD_OUT)[host + 1], model_type, gone[-1])
    assert (row["error_before"], row["error_after"]) == pytest.approx((unfitted, fitted), rel=1e-4)
    assert fitted < unfitted
    surgery.apply(model, plan)
    written = map_of(model_type, decoder_layers(model)[host])
    torch.testing.assert_close(written.weight, expected.weight, rtol=1e-4, atol=1e-5)
    if written.bias is not None:
        torch.testing.assert_close(written.bias, expected.bias, rtol=1e-4, atol=1e-5)


def error_of(states: torch.Tensor, model_type: str, layer: int) -> float:
    """The mean over the tokens of ‖H − f‖² / ‖H‖², with H of the dense model's layer."""
    target = states_behind(pico_model(model_type), HELD_OUT)[layer + 1].double()
    return ((target - states.double()).square().sum(-1) / target.square().sum(-1)).mean().item()


def test_the_text_comes_in_any_portions(monkeypatch):
    model = pico_model()
    plans = []
    for chunk, portion in ((20, 1), (100_000, 24)):
        monkeypatch.setattr(least_squares, "CHUNK", chunk)
        plans.append(fit_outputs(model, plan_for(model, DropLayers((1, 4))), IDS.split(portion), ONE))
    assert plans[0].tensors.keys() == plans[1].tensors.keys() == {"layers.0.mlp.weight", "layers.3.mlp.weight"}
    for name, value in plans[0].tensors.items():
        torch.testing.assert_close(value, plans[1].tensors[name], rtol=1e-4, atol=1e-6)


def test_a_later_fit_sees_what_the_earlier_ones_made(monkeypatch):
    model = pico_model()
    plan = fit_outputs(model, plan_for(model, DropLayers((1, 4))), IDS.split(6), ONE)
    lower = replace(plan, steps=plan.steps[:2]).with_tensors({n: t for n, t in plan.tensors.items() if ".0." in n})
    pruned = pico_model()
    surgery.apply(pruned, replace(lower, steps=(DropLayers((1, 4)), lower.steps[1])))
    host = solved_at_once("llama", 2, [4], 3.0, pruned)
    torch.testing.assert_close(plan.tensors["layers.3.mlp.weight"], host.mlp.down_proj.weight, rtol=1e-4, atol=1e-5)


def test_ridge_is_the_one_of_least_error_on_samples_held_out():
    model = pico_model()
    plan = plan_for(model, DropLayers((2,)))
    values = (1e-6, 0.01, 1.0, 100.0)
    errors = {
        ridge: fit_outputs(model, plan, [IDS], LeastSquares(ridge=(ridge,), held_out=1 / 6)).outcome["least_squares"][
            "fits"
        ][0]["error_after"]
        for ridge in values
    }
    fitted = fit_outputs(model, plan, [IDS], LeastSquares(ridge=values, held_out=1 / 6))
    (row,) = fitted.outcome["least_squares"]["fits"]
    assert row["error_after"] == min(errors.values())
    assert errors[row["ridge"]] == row["error_after"]
    assert len(set(errors.values())) == 4


def test_a_layer_that_no_fit_improves_keeps_its_weights():
    model = pico_model()
    plan = plan_for(model, DropLayers((2,)))
    # As many tokens as inputs and no ridge to speak of: worse than nothing on the other sample.
    fitted = fit_outputs(model, plan, [IDS.flatten()[:96].view(2, 48)], LeastSquares(ridge=(1e-9,), held_out=0.5))
    (row,) = fitted.outcome["least_squares"]["fits"]
    assert row["ridge"] is None
    assert row["error_after"] == row["error_before"]
    assert fitted.steps == plan.steps
    assert not fitted.tensors


@pytest.mark.parametrize("steps", [(MergeLayers(1, 3, "keep_top", "top"),), (MergeLayers(1, 3, "sum", "mean"),)])
def test_the_host_of_a_merged_window_is_fitted(steps):
    model = pico_model("qwen3")
    settings = replace(ONE, outputs="both")
    plan = fit_outputs(model, plan_for(model, *steps), [IDS], settings)
    assert [(s.layer, s.group) for s in plan.steps if isinstance(s, RefitOutput)] == [(3, "attention"), (3, "mlp")]
    first, second = plan.outcome["least_squares"]["fits"]
    assert second["error_before"] == pytest.approx(first["error_after"], rel=1e-6)
    assert second["error_after"] < second["error_before"]
    merged = pico_model("qwen3")
    surgery.apply(merged, plan_for(merged, *steps))
    assert first["error_before"] == pytest.approx(qwen_error(merged), rel=1e-4)
    surgery.apply(model, plan)
    assert second["error_after"] == pytest.approx(qwen_error(model), rel=1e-4)


def qwen_error(model) -> float:
    return error_of(states_behind(model, HELD_OUT)[2], "qwen3", 3)


def test_later_layers_are_fitted_to_the_depth_they_stand_for():
    model = pico_model()
    settings = replace(ONE, later_layers=True)
    plan = plan_for(model, DropLayers((1,)))
    assert count_fits(plan, settings) == 5
    assert count_fits(plan, ONE) == 1
    assert count_fits(plan, replace(settings, outputs="both")) == 10
    fitted = fit_outputs(model, plan, [IDS], settings)
    rows = fitted.outcome["least_squares"]["fits"]
    assert [(row["layer"], row["high"]) for row in rows] == [(0, 1), (2, 2), (3, 3), (4, 4), (5, 5)]
    surgery.apply(model, fitted)
    assert rows[-1]["error_after"] == pytest.approx(error_of(states_behind(model, HELD_OUT)[5], "llama", 5), rel=1e-4)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((DropLayers((0, 1, 4)),), [(2, 0, 2), (3, 3, 4), (5, 5, 5)]),
        ((DropLayers((5,)),), [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 5)]),
        ((MergeLayers(1, 3, "keep_bottom"), DropLayers((4,))), [(0, 0, 0), (1, 1, 4), (5, 5, 5)]),
        ((DropLayers((0,)), MergeLayers(1, 3, "keep_top")), [(3, 0, 3), (4, 4, 4), (5, 5, 5)]),
    ],
)
def test_spans(steps, expected):
    plan = plan_for(pico_model(), *steps)
    assert [(span.layer, span.low, span.high) for span in spans(plan)] == expected
    assert [span.alone for span in spans(plan)] == [low == high for _, low, high in expected]
    assert all(isinstance(span, Span) for span in spans(plan))


def test_memory_does_not_grow_with_the_text_and_the_work_is_counted(monkeypatch):
    monkeypatch.setattr(least_squares, "CHUNK", 80)
    model = pico_model()
    plan = plan_for(model, DropLayers((2, 4)))
    settings = LeastSquares(ridge=(0.1, 1.0), held_out=0.25)
    peaks, runs = [], []

    def count(module, args, output):
        runs.append((output[0] if isinstance(output, tuple) else output).shape[0])

    hooks = [layer.register_forward_hook(count) for layer in decoder_layers(model)]
    for samples in (32, 128):
        runs.clear()
        ids = torch.randint(3, 512, (samples, 20), generator=torch.Generator().manual_seed(2))
        with TensorBytes(model) as tensors:
            fitted = fit_outputs(model, plan, [ids], settings)
        peaks.append(tensors.peak)
        counted = fitted.outcome["least_squares"]["layer_forwards"]
        assert counted == pytest.approx(sum(runs) / samples, abs=0.02)
        # The dense model up to layer 4; the other from layer 1 up, its two fitted layers twice; half a pass for λ.
        assert counted <= 5 + 1 + 2 + 2 * 2 * 0.25 + 6 * 2 * 4 / samples + 0.02
    for hook in hooks:
        hook.remove()
    assert peaks[1] - peaks[0] < 96 * 20 * 8 * 2  # the token ids; one hidden state of them has eight times as much


def test_what_cannot_be_fitted_is_refused():
    model = pico_model()
    with pytest.raises(UsageError, match="got 1 sample.*at least two.*data.fitting"):
        fit_outputs(model, plan_for(model, DropLayers((2,))), [IDS[:1]], ONE)
    with pytest.raises(UsageError, match=r"ridge is \[0.0\]; give one or more positive"):
        LeastSquares(ridge=(0.0,))
    with pytest.raises(UsageError, match=r"held_out is 0.6; it is a share of the samples, in \(0, 0.5\]"):
        LeastSquares(held_out=0.6)
    decoder_layers(model)[1].mlp.down_proj.weight[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="not finite.*bfloat16"):
        fit_outputs(model, plan_for(model, DropLayers((2,))), [IDS], ONE)


def test_what_is_normalised_with_the_hidden_state_is_left_alone():
    model = pico_model("opt", do_layer_norm_before=False)
    plan = plan_for(model, DropLayers((2,)))
    assert fit_outputs(model, plan, [IDS], ONE).steps == plan.steps


def test_a_hidden_state_of_another_dtype_is_kept_as_it_is():
    model = pico_model()
    expected = fit_outputs(model, plan_for(model, DropLayers((2,))), [IDS], ONE)
    model = model.double()
    fitted = fit_outputs(model, plan_for(model, DropLayers((2,))), [IDS], ONE)
    (name,) = fitted.tensors
    assert fitted.tensors[name].dtype == torch.float64
    torch.testing.assert_close(fitted.tensors[name].float(), expected.tensors[name], rtol=1e-3, atol=1e-5)


def _fit_in_one_of_two(rank: int, directory: str) -> None:
    model = pico_model()
    with torch.no_grad():
        plan = fit_outputs(model, plan_for(model, DropLayers((1, 4))), IDS[rank::2].split(5), ONE)
    plan.save(Path(directory) / f"plan_{rank}.json")


@pytest.mark.long
def test_two_processes_fit_alike(tmp_path):
    in_two_processes(_fit_in_one_of_two, tmp_path)
    first, second = (Plan.load(tmp_path / f"plan_{rank}.json") for rank in range(2))
    assert first.to_json() == second.to_json()
    model = pico_model()
    alone = fit_outputs(model, plan_for(model, DropLayers((1, 4))), IDS.split(5), ONE)
    assert first.steps == alone.steps
    for name, value in alone.tensors.items():
        torch.testing.assert_close(first.tensors[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 2}, "refits mlp of layer 2, which does not stay"),
        ({"weight": "other"}, "writes the tensor 'other' into mlp of layer 1; it is missing.*safetensors"),
        ({"group": "attention"}, r"into attention of layer 1; its shape is \(32, 48\), needed is \(32, 32\)"),
        ({"bias": "layers.1.mlp.weight"}, "gives mlp of layer 1 a bias, but it has no bias"),
    ],
)
def test_a_plan_that_refits_what_is_not_there_is_refused(change, message):
    model = pico_model()
    plan = fit_outputs(model, plan_for(model, DropLayers((2,))), [IDS], ONE)
    drop, refit = plan.steps
    wrong = Plan.from_dict(json.loads(replace(plan, steps=(drop, replace(refit, **change))).to_json()), "it")
    with pytest.raises(UsageError, match=message):
        surgery.apply(model, replace(wrong, tensors=plan.tensors))
    with pytest.raises(UsageError, match="refits a projection twice"):
        surgery.apply(model, replace(plan, steps=(drop, refit, refit)))
    broken = plan.with_tensors({refit.weight: plan.tensors[refit.weight] * math.inf})
    with pytest.raises(UsageError, match="mlp of layer 1 is to get hold numbers that are not finite"):
        surgery.apply(model, broken)
    assert len(decoder_layers(model)) == 6
