"""Distillation against independent computations, on pico models of every architecture."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slm_pl.compression import surgery
from slm_pl.compression.architecture import backbone, decoder_layers, logits, num_layers
from slm_pl.compression.plan import Base, DropLayers, KeepChannels, KeepHidden, MergeLayers, Method, Plan
from slm_pl.errors import UsageError
from slm_pl.recovery import distillation
from slm_pl.recovery.distillation import (
    Distillation,
    Targets,
    check_teacher,
    divergence,
    hidden_distance,
    layer_origins,
    teacher_targets,
)
from tests.helpers.pico import CONFIGS, pico_model

V = 512
HIDDEN = Distillation(hidden_weight=1.0)


def make_inputs(seed: int = 0) -> dict[str, Tensor]:
    """Two rows, of which the second is padded on the right."""
    torch.manual_seed(seed)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return {
        "input_ids": torch.randint(3, V, (2, 12)) * mask,
        "position_ids": torch.arange(12).expand(2, -1).contiguous(),
        "attention_mask": mask,
    }


def make_selected() -> Tensor:
    selected = torch.zeros(2, 12, dtype=torch.bool)
    selected[0, 3:11] = selected[1, 2:8] = True
    return selected


def plan_for(model: torch.nn.Module, *steps: object) -> Plan:
    return Plan(Base.of(model), Method("callbacks.Drop", {}), None, steps)


@torch.no_grad()
def logits_at(model: torch.nn.Module, selected: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits[selected]


def full_divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Of logits, by torch.distributions in float64."""
    p, q = (torch.distributions.Categorical(logits=x.double() / temperature) for x in (teacher, student))
    return torch.distributions.kl_divergence(p, q).sum() * temperature**2


def coarse_divergence(teacher: Tensor, student: Tensor, k: int, temperature: float) -> float:
    """Of logits, over the teacher's k likeliest tokens and one class of all others, in plain Python."""
    total = 0.0
    for p, q in zip(*((x.double() / temperature).softmax(1) for x in (teacher, student)), strict=True):
        order = sorted(range(len(p)), key=lambda token: -float(p[token]))
        classes = [[token] for token in order[:k]] + [order[k:]]
        for tokens in classes:
            a, b = sum(float(p[t]) for t in tokens), sum(float(q[t]) for t in tokens)
            total += a * float(torch.tensor(a / b, dtype=torch.float64).log())
    return total * temperature**2


def confident(seed: int) -> torch.nn.Module:
    """A model in double precision whose distributions are not flat."""
    model = pico_model(seed=seed).double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def teacher() -> torch.nn.Module:
    return confident(0)


@pytest.fixture(scope="module")
def student() -> torch.nn.Module:
    return confident(1)


def targets_of(teacher: torch.nn.Module, settings: Distillation, layers: Sequence[int] = range(6)) -> Targets:
    return teacher_targets(teacher, make_inputs(), make_selected(), settings, layers)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, V, V + 1])
def test_whole_vocabulary_gives_the_textbook_divergence(teacher, student, top_k, temperature):
    settings = Distillation(top_k=top_k, temperature=temperature)
    targets = targets_of(teacher, settings)
    assert targets.indices is None
    assert targets.rest is None
    ours, theirs = (logits_at(model, make_selected(), make_inputs()) for model in (student, teacher))
    got = divergence(ours, targets, settings)
    assert got.shape == ()
    torch.testing.assert_close(got, full_divergence(theirs, ours, temperature))
    # In float32, as of a model in float32 or less.
    single = replace(targets, log_probabilities=targets.log_probabilities.float())
    rounded = divergence(ours.float(), single, settings)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), got, rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 7, 64, V - 1])
def test_top_k_gives_the_divergence_over_k_tokens_and_the_rest(teacher, student, top_k, temperature):
    settings = Distillation(top_k=top_k, temperature=temperature)
    targets = targets_of(teacher, settings)
    ours, theirs = (logits_at(model, make_selected(), make_inputs()) for model in (student, teacher))
    expected = coarse_divergence(theirs, ours, top_k, temperature)
    assert float(divergence(ours, targets, settings)) == pytest.approx(expected, rel=1e-9)
    assert targets.log_probabilities.shape == targets.indices.shape == (14, top_k)
    mass = targets.log_probabilities.exp().sum(1) + targets.rest.exp()
    torch.testing.assert_close(mass, torch.ones(14, dtype=torch.float64))


def test_divergence_rises_with_k_to_that_over_the_vocabulary(teacher, student):
    ours, theirs = (logits_at(model, make_selected(), make_inputs()) for model in (student, teacher))
    values = []
    for k in (1, 2, 8, 64, 256, V - 1):
        settings = Distillation(top_k=k)
        values.append(float(divergence(ours, targets_of(teacher, settings), settings)))
    assert values == sorted(values)
    assert 0 < values[0] < 0.9 * values[-1]
    # V - 1 tokens and "all others", which is one token, are the whole vocabulary.
    assert values[-1] == pytest.approx(float(full_divergence(theirs, ours)), rel=1e-9)


@pytest.mark.parametrize("top_k", [3, None])
def test_equal_models_do_not_differ_and_others_do(teacher, student, top_k):
    settings = Distillation(top_k=top_k, hidden_weight=1.0)
    targets = targets_of(teacher, settings)
    assert 0 <= float(divergence(logits_at(teacher, make_selected(), make_inputs()), targets, settings)) < 1e-5
    assert float(divergence(logits_at(student, make_selected(), make_inputs()), targets, settings)) > 1
    mask = make_inputs()["attention_mask"]
    for model, differs in ((teacher, False), (student, True)):
        with torch.no_grad():
            states = backbone(model)(**make_inputs(), output_hidden_states=True).hidden_states
        assert (float(hidden_distance(states[1:-1], targets, mask)) > 0) is differs


@pytest.mark.parametrize("top_k", [2, None])
def test_certain_teacher_and_bf16_student_stay_finite(top_k):
    settings = Distillation(top_k=top_k)
    certain = torch.full((3, 10), -1e4)
    certain[:, :2] = torch.tensor([30.0, 29.0])
    certain[2, 2:] = -torch.inf  # nothing at all is left for the others
    teacher = pico_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "logits", lambda *_: certain)
        targets = teacher_targets(teacher, make_inputs(), torch.zeros(2, 12, dtype=torch.bool), settings, range(6))
    student = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    loss = divergence(student, targets, settings)
    loss.backward()
    assert loss.dtype == torch.float32
    assert 0 < float(loss.detach()) < 100
    assert student.grad.isfinite().all()
    # What a certain teacher wants is the cross-entropy to its two tokens.
    p = torch.tensor([1.0, 0.0]).softmax(0)
    expected = (p * (p.log() - student.detach().float().log_softmax(1)[:, :2])).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("top_k", [None, 1, 4])
def test_gradient_of_the_divergence(top_k):
    torch.manual_seed(0)
    settings = Distillation(top_k=top_k, temperature=1.7)
    p = torch.randn(5, 9, dtype=torch.float64)
    indices = None if top_k is None else p.topk(top_k).indices
    log_p = (p / 1.7).log_softmax(1)
    if indices is None:
        targets = Targets(log_p, None, None, ())
    else:
        kept = log_p.gather(1, indices)
        targets = Targets(kept, indices, (1 - kept.exp().sum(1)).log(), ())
    student = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    assert divergence(student, targets, settings).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: divergence(x, targets, settings), (student,))
    if top_k is None:  # T (softmax(student / T) - softmax(teacher / T))
        divergence(student, targets, settings).backward()
        expected = 1.7 * ((student.detach() / 1.7).softmax(1) - (p / 1.7).softmax(1))
        torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("top_k", [8, None])
def test_slices_equal_the_whole_and_stay_small(teacher, monkeypatch, top_k):
    settings = Distillation(top_k=top_k)
    whole = targets_of(teacher, settings)
    sizes = []

    def watched(model: torch.nn.Module, hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return logits(model, hidden)

    monkeypatch.setattr(distillation, "logits", watched)
    monkeypatch.setattr(distillation, "_SLICE_BYTES", 3 * V * 4)
    sliced = targets_of(teacher, settings)
    assert sizes == [3, 3, 3, 3, 2]
    torch.testing.assert_close(sliced.log_probabilities, whole.log_probabilities)
    if top_k is not None:
        assert torch.equal(sliced.indices, whole.indices)
        torch.testing.assert_close(sliced.rest, whole.rest)


@pytest.mark.parametrize("top_k", [8, None])
def test_no_selected_position_adds_nothing(teacher, top_k):
    settings = Distillation(top_k=top_k)
    nothing = torch.zeros(2, 12, dtype=torch.bool)
    targets = teacher_targets(teacher, make_inputs(), nothing, settings, range(6))
    student = torch.zeros(0, V, requires_grad=True)
    loss = divergence(student, targets, settings)
    loss.backward()
    assert float(loss.detach()) == 0


@pytest.mark.parametrize("model_type", CONFIGS)
def test_teacher_says_what_its_own_forward_and_layers_say(model_type):
    model = pico_model(model_type)
    settings = Distillation(top_k=5, hidden_weight=0.1)
    inputs, selected, outputs = make_inputs(), make_selected(), []

    def note(module: torch.nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(note) for layer in decoder_layers(model)]
    expected = logits_at(model, selected, inputs).log_softmax(1)
    for handle in handles:
        handle.remove()
    targets = teacher_targets(model, inputs, selected, settings, [1, 3, 4, 5])
    torch.testing.assert_close(expected.topk(5).values, targets.log_probabilities)
    torch.testing.assert_close(expected.gather(1, targets.indices), targets.log_probabilities)
    assert len(targets.hidden) == 3  # of the last layer there is none
    for layer, hidden in zip((1, 3, 4), targets.hidden, strict=True):
        assert torch.equal(hidden, outputs[layer])
    assert not any(value.requires_grad for value in (targets.log_probabilities, targets.rest, *targets.hidden))
    assert not any(value.is_inference() for value in targets.hidden)  # they enter a graph
    assert targets_of(model, replace(settings, hidden_weight=0.0)).hidden == ()


def test_packed_sequences_are_told_apart_by_their_positions(teacher):
    settings = Distillation(top_k=4, hidden_weight=1.0)
    ids = make_inputs()["input_ids"][:1]
    everywhere = torch.ones(1, 12, dtype=torch.bool)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = teacher_targets(teacher, {"input_ids": ids, "position_ids": positions}, everywhere, settings, range(6))
    for part in (slice(0, 5), slice(5, 12)):
        inputs = {"input_ids": ids[:, part], "position_ids": positions[:, part]}
        alone = teacher_targets(teacher, inputs, everywhere[:, part], settings, range(6))
        torch.testing.assert_close(packed.log_probabilities[part], alone.log_probabilities)
        for ours, theirs in zip(packed.hidden, alone.hidden, strict=True):
            torch.testing.assert_close(ours[:, part], theirs)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_student_learns_hidden_states_also_under_gradient_checkpointing(model_type):
    dense, inputs = pico_model(model_type), make_inputs()
    model = pico_model(model_type)
    plan = plan_for(model, DropLayers((1, 4)))
    surgery.apply(model, plan)
    layers = layer_origins([plan], 6)
    targets = teacher_targets(dense, inputs, make_selected(), HIDDEN, layers)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        states = backbone(model.train())(**inputs, use_cache=False, output_hidden_states=True).hidden_states
        assert len(states) == num_layers(model) + 1
        hidden_distance(states[1:-1], targets, inputs["attention_mask"]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(), plain)
    first, last = ({id(p) for p in decoder_layers(model)[index].parameters()} for index in (0, -1))
    moved = {id(p) for name, p in model.named_parameters() if name in plain and plain[name].any()}
    assert moved & first
    assert not moved & last  # whose hidden states are not compared


def test_hidden_distance_is_what_a_loop_finds(teacher, student):
    inputs = make_inputs()
    layers = (0, 2, 5)  # of a student with three layers
    targets = targets_of(teacher, HIDDEN, layers)
    with torch.no_grad():
        taught = backbone(teacher)(**inputs, output_hidden_states=True).hidden_states
        states = backbone(student)(**inputs, output_hidden_states=True).hidden_states[:4]
    expected = 0.0
    for row in range(2):
        for token in range(12):
            if inputs["attention_mask"][row, token]:
                for ours, theirs in ((states[1], taught[1]), (states[2], taught[3])):
                    a, b = ours[row, token].double(), theirs[row, token].double()
                    expected += float(((a - b) @ (a - b)) / (b @ b)) / 2
    got = hidden_distance(states[1:-1], targets, inputs["attention_mask"])
    assert float(got) == pytest.approx(expected, rel=1e-5)
    # It adds up over micro-batches.
    rows = [
        hidden_distance(
            [h[row : row + 1] for h in states[1:-1]],
            replace(targets, hidden=tuple(h[row : row + 1] for h in targets.hidden)),
            inputs["attention_mask"][row : row + 1],
        )
        for row in range(2)
    ]
    torch.testing.assert_close(sum(rows), got)


def test_half_precision_is_compared_in_float32():
    torch.manual_seed(0)
    ours, theirs = (torch.randn(1, 4, 8).bfloat16() for _ in range(2))
    targets = Targets(torch.zeros(0), None, None, (theirs,))
    got = hidden_distance([ours], targets, torch.ones(1, 4))
    expected = (ours.float() - theirs.float()).pow(2).sum(-1) / theirs.float().pow(2).sum(-1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected.sum())


def test_student_of_one_layer_has_no_hidden_states_to_compare(teacher):
    targets = targets_of(teacher, HIDDEN, (5,))
    assert float(hidden_distance([], targets, make_inputs()["attention_mask"])) == 0


@pytest.mark.parametrize(
    "rounds",
    [
        [],
        [(DropLayers((0, 3)),)],
        [(MergeLayers(1, 3),)],
        [(MergeLayers(3, 4), MergeLayers(0, 1), DropLayers((2,)))],
        [(MergeLayers(1, 2),), (DropLayers((0,)),), (MergeLayers(1, 2), KeepChannels(0, "mlp", (1, 2, 3)))],
        [(KeepHidden(tuple(range(16))),), (DropLayers((5, 1)),)],
    ],
)
def test_origins_are_the_layers_whose_weights_are_left(rounds):
    model, dense = pico_model(), pico_model()
    for index, layer in enumerate(decoder_layers(model)):
        with torch.no_grad():
            layer.input_layernorm.weight.fill_(index)
    plans = []
    for steps in rounds:
        plans.append(plan_for(model, *steps))
        surgery.apply(model, plans[-1])  # windows keep the top layer's weights
    found = [int(layer.input_layernorm.weight[0]) for layer in decoder_layers(model)]
    assert layer_origins(plans, num_layers(dense)) == found


@pytest.mark.parametrize("consolidation", ["keep_bottom", "sum", "mean"])
def test_window_stands_for_its_highest_layer_however_it_is_merged(consolidation):
    plan = plan_for(pico_model(), MergeLayers(1, 3, consolidation, "bottom"))
    assert layer_origins([plan], 6) == [0, 3, 4, 5]


def test_teacher_of_another_depth_is_refused():
    plan = plan_for(pico_model(), DropLayers((1,)))
    with pytest.raises(UsageError, match="teacher has 8 layers, but the student was made of a model that had 6"):
        layer_origins([plan], 8)


def test_teacher_must_fit():
    teacher = pico_model()
    check_teacher(teacher, pico_model(seed=1), HIDDEN)
    with pytest.raises(UsageError, match="vocabulary has 512 tokens, the student's 300"):
        check_teacher(teacher, pico_model(vocab_size=300), Distillation())
    narrow = pico_model()
    surgery.apply(narrow, plan_for(narrow, KeepHidden(tuple(range(16)))))
    check_teacher(teacher, narrow, Distillation())
    with pytest.raises(UsageError, match="student's hidden state has 16 channels and the teacher's 32. Set it to 0"):
        check_teacher(teacher, narrow, HIDDEN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.5}, "distillation.weight is -0.5; give a number of at least 0"),
        ({"weight": float("nan")}, "distillation.weight is nan"),
        ({"hidden_weight": float("inf")}, "distillation.hidden_weight is inf"),
        ({"weight": 0.0}, "are both 0, which teaches nothing"),
        ({"temperature": 0.0}, "distillation.temperature is 0.0; give a number above 0"),
        ({"top_k": 0}, "distillation.top_k is 0; give at least 1 (usual: 64), or null for all tokens"),
    ],
)
def test_settings_that_teach_nothing_are_refused(options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        Distillation(**options)


def test_training_teacher_is_refused():
    with pytest.raises(AssertionError, match="dropout"):
        targets_of(pico_model().train(), Distillation())


def test_student_moves_towards_the_teacher():
    teacher, student, inputs, selected = pico_model(), pico_model(seed=1), make_inputs(), make_selected()
    settings = Distillation(top_k=16, hidden_weight=1.0)
    targets = teacher_targets(teacher, inputs, selected, settings, range(6))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        output = student(**inputs, use_cache=False, output_hidden_states=True)
        pair = (
            divergence(output.logits[selected], targets, settings),
            hidden_distance(output.hidden_states[1:-1], targets, inputs["attention_mask"]),
        )
        optimizer.zero_grad()
        sum(pair).backward()
        optimizer.step()
        losses.append([float(loss.detach()) for loss in pair])
    assert losses[-1][0] < 0.7 * losses[0][0]
    assert losses[-1][1] < 0.7 * losses[0][1]
