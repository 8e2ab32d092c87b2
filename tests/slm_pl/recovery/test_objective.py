import pytest
import torch

from slm_pl.compression.architecture import architecture_of
from slm_pl.data.batching import Example, Slot, collate
from slm_pl.recovery import objective
from tests.helpers.pico import CONFIGS, pico_model

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES: list[Example] = [
    {
        "input_ids": [5, 9, 31, 77, 12, 40, 8, 90, 91, 13, 14, 15],
        "labels": [-100] * 4 + [12, 40, 8, 90, 91, 13, 14, 15],
    },
    {"input_ids": [6, 7, 8], "labels": [6, 7, 8]},
    {"input_ids": [44, 3, 17, 21, 22, 23, 24], "labels": [-100, -100, -100, 21, 22, 23, 24]},
    {"input_ids": [100, 101, 102, 103], "labels": [-100, -100, -100, 103]},
]


def likelihood(model, batch):
    states, _ = objective.final_states(model, objective.model_inputs(model, batch))
    selected = objective.predicting(batch["labels"])
    targets = batch["labels"].roll(-1, 1)[selected]
    return objective.negative_log_likelihood(model, states[selected], targets, batch["most_labels"])


def one_by_one(model):
    """The sum over all examples, each run by itself and shifted by hand."""
    total = torch.zeros(())
    for example in EXAMPLES:
        logp = model(torch.tensor([example["input_ids"]])).logits[0].float().log_softmax(-1)
        for position, label in enumerate(example["labels"][1:]):
            if label != -100:
                total = total - logp[position, label]
    return total


@pytest.mark.parametrize("row_length", [None, 14, 1000], ids=["padded", "two rows", "one row"])
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_no_token_attends_across_examples(model_type, row_length):
    model = pico_model(model_type)
    batch = collate(EXAMPLES, 0, row_length, Slot((), 1, 1, 16))
    assert len(batch["input_ids"]) == {None: 4, 14: 2, 1000: 1}[row_length]
    found, expected = likelihood(model, batch), one_by_one(model)
    if row_length and not architecture_of(model).packable:
        assert abs(found - expected) > 1e-3, "it would keep them apart after all"
        return
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    # and the gradient is that of every example by itself
    weights = [p for p in model.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(found, weights, allow_unused=True),
        torch.autograd.grad(expected, weights, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_slices_of_the_logits_change_nothing(monkeypatch):
    model = pico_model("gemma2")  # with a cap on its logits
    batch = collate(EXAMPLES, 0, None, Slot((), 1, 1, 16))
    whole = likelihood(model, batch)
    weights = list(model.parameters())
    gradients = torch.autograd.grad(whole, weights)
    calls = []
    model.lm_head.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    monkeypatch.setattr(objective, "LOGITS_BUDGET", 4 * 512 * 3)  # three positions at a time, of the most there are
    sliced = likelihood(model, batch)
    assert len(calls) == 6  # 16 by 3, also where a micro-batch has fewer
    assert max(calls) <= 3
    assert likelihood(model, collate([], 0, None, Slot((), 1, 1, 16))) == 0
    assert len(calls) == 12
    torch.testing.assert_close(sliced, whole, rtol=1e-6, atol=0)
    for one, other in zip(torch.autograd.grad(sliced, weights), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_micro_batch_without_examples_has_a_loss_of_zero_and_a_gradient():
    model = pico_model()
    found = likelihood(model, collate([], 0, 100, Slot((), 5, 9, 4)))
    assert found.item() == 0
    found.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.model.layers.parameters())
