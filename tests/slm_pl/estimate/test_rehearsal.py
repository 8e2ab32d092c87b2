"""Work that is counted on the stand-in, against sums by hand and against what real models are seen to do."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import callbacks
from slm_pl.compression.architecture import decoder_layers, idle_expert_bytes
from slm_pl.compression.least_squares import CHUNK, LeastSquares
from slm_pl.data import CalibrationSet, CalibrationText
from slm_pl.estimate.rehearsal import (
    FITTED,
    FITTED_TOKENS,
    SAMPLES,
    TOKENS,
    Rehearsal,
    Work,
    layer_operations,
    stand_in,
)
from tests.helpers.pico import CONFIGS, pico_model
from tests.helpers.run import IDS

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 6
FIRST = 1 / SAMPLES  # one sample goes through alone, for its memory


def work_of(method: callbacks.CompressionCallback, layers: int = LAYERS) -> Work:
    return Rehearsal(layers, 1.5).perform(method)[0]


def removals(kept: int) -> int:
    """Layer forwards of removing each of the layers that are left by itself: what is below it, once, and above it."""
    return kept - 1 + sum(kept - 1 - place for place in range(kept))


@pytest.mark.parametrize("layers", [4, 9])
def test_layers_removed_one_at_a_time(layers):
    work = work_of(callbacks.ShortenedLLaMA(remove_layers=2, protect_first=0, protect_last=0), layers)
    assert work.layers == pytest.approx(layers + removals(layers) + FIRST * layers)
    # The loss of the dense model and of each candidate; the last token of a sample predicts nothing.
    assert work.heads == pytest.approx((1 + layers) * (TOKENS - 1) / TOKENS)
    assert not work.differentiates


def test_layers_removed_again_and_again():
    work = work_of(callbacks.SLEB(3, protect_first=0, protect_last=0), 7)
    assert work.layers == pytest.approx((1 + FIRST) * 7 + removals(7) + removals(6) + removals(5))


def test_one_pass_and_no_pass():
    assert work_of(callbacks.BlockInfluence(remove_layers=2)) == Work(LAYERS, 0)
    assert work_of(callbacks.ShortenedLLaMA("magnitude", remove_layers=1), 9) == Work(0, 0)


def test_gradients_take_a_forward_and_two_backward_passes_on_top():
    work = work_of(callbacks.ShortenedLLaMA("taylor", remove_layers=2), 9)
    assert work.layers == pytest.approx(4 * 9)  # forward twice: its input is kept, and what is in it made again
    assert work.differentiates


@pytest.mark.parametrize(
    "method",
    [
        callbacks.SlidingWindowMerging(remove_layers=2),
        callbacks.SlidingWindowMerging(remove_layers=2, search="best_first", similarity="token_cosine"),
        callbacks.SlidingWindowMerging(remove_layers=2, search="best_first", similarity="cka"),
    ],
    ids=["top_down", "best_first", "cka"],
)
def test_search_as_it_counts_itself(method):
    plan = method.plan(stand_in(LAYERS, 1.5), CalibrationSet.from_ids(sample_ids(), CalibrationText(batch_size=4)))
    assert work_of(method).layers == pytest.approx(plan.outcome["layer_forwards"], rel=1e-9)


def sample_ids() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 251, (SAMPLES, TOKENS), generator=generator).tolist()


def test_least_squares():
    settings = LeastSquares(ridge=(0.01, 0.1, 1.0))
    method = callbacks.LayerRemoval(layers=[2], consolidation="least_squares", least_squares=settings)
    search, fit = Rehearsal(LAYERS, 1.5).perform(method)
    assert search == Work(0, 0)
    assert fit is not None
    assert (fit.solutions, fit.columns) == (3, 6)  # each ridge factors its matrix, and goes through it down and up
    held = settings.held_out
    assert fit.products == pytest.approx(1 - held)  # the samples that are not held out
    # The dense model up to the layer that goes; the one before it, on what is fitted, and on what is held out once as
    # it is and once for every ridge; and two passes over the chunk that is looked at first.
    chunk = CHUNK / (FITTED * FITTED_TOKENS)
    assert fit.layers == pytest.approx(3 + (1 - held) + 4 * held + 2 * LAYERS * chunk)


def test_methods_one_after_the_other():
    depth = callbacks.SLEB(2, protect_first=0, protect_last=0)
    width = callbacks.FLAP(0.2)
    rehearsal = Rehearsal(LAYERS, 1.5)
    assert rehearsal.perform(depth)[1] is None
    work, _ = rehearsal.perform(width)
    assert work.layers == pytest.approx(LAYERS - 2)
    again, _ = rehearsal.perform(callbacks.BlockInfluence(remove_layers=1), apply=False)
    assert 0.7 * (LAYERS - 2) < again.layers < 0.9 * (LAYERS - 2)  # narrower layers, in units of whole ones
    assert rehearsal.perform(callbacks.BlockInfluence(remove_layers=1))[0] == again


def test_chance_of_the_caller_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Rehearsal(4, 1.5).perform(callbacks.BlockInfluence(remove_layers=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name != "opt"])
def test_operations_of_a_layer(model_type):
    """Against torch's own counter of what the model runs; experts are grouped products, which it does not know."""
    model = pico_model(model_type).eval()
    model.set_attn_implementation("eager")
    ids = IDS[:2, :12]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(input_ids=ids, use_cache=False)
    counts = counter.get_flop_counts()
    layers = decoder_layers(model)
    path = next(name for name, module in model.named_modules() if module is layers)
    names = [f"{type(model).__name__}.{path}.{index}" for index in range(len(layers))]
    counted = sum(sum(counts[name].values()) for name in names)
    expected = len(layers) * layer_operations(model, ids.numel(), ids.shape[1])
    if idle_expert_bytes(model):
        assert expected >= counted > 0
    else:
        assert counted == pytest.approx(expected)
