import json

import pytest
import torch

from slm_pl.errors import UsageError
from slm_pl.evaluation.harness import task_prompts
from slm_pl.evaluation.representation import representation_similarity
from tests.helpers.pico import pico_model
from tests.slm_pl.compression.test_scores import hsic_of_song, kernel_matrix

IDS = torch.randint(3, 512, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "qwen3_moe"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_matrix_is_the_minibatch_cka_of_the_layers_outputs(model_type, kernel):
    model = pico_model(model_type)
    with torch.inference_mode():
        states = model(input_ids=IDS, output_hidden_states=True).hidden_states[1:]
    found = representation_similarity(model, IDS, kernel)
    assert len(found) == 6
    grams = [[kernel_matrix(sample.double(), kernel) for sample in state] for state in states]

    def mean_hsic(i: int, j: int) -> float:
        return sum(hsic_of_song(k, other) for k, other in zip(grams[i], grams[j], strict=True)) / 3

    for i, j in ((0, 0), (0, 1), (2, 5), (4, 3)):
        expected = mean_hsic(i, j) / (mean_hsic(i, i) * mean_hsic(j, j)) ** 0.5
        # float32 forwards of one sample and of three differ in the last digits.
        assert found[i][j] == pytest.approx(expected, abs=1e-4)
    assert all(found[i][j] == found[j][i] for i in range(6) for j in range(6))
    assert len({round(value, 6) for row in found for value in row}) > 10


def test_samples_may_differ_in_length_and_come_in_batches():
    model = pico_model()
    singles = representation_similarity(model, [IDS[0], IDS[1], IDS[2, :7]])
    batched = representation_similarity(model, [IDS[:2], IDS[2:, :7]])
    assert singles == batched
    assert singles != representation_similarity(model, IDS)


def test_model_of_any_architecture():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=512)).train()
    matrix = representation_similarity(model, IDS)
    assert (len(matrix), matrix[1][1]) == (3, pytest.approx(1))
    assert model.training  # as it came


def test_states_that_are_not_finite_name_layer_and_sample():
    model = pico_model()
    model.model.layers[3].register_forward_hook(lambda module, args, output: output * float("inf"))
    with pytest.raises(FloatingPointError, match=r"On sample 0, layer 3 gives .*--model\.dtype bfloat16"):
        representation_similarity(model, IDS)
    model = pico_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS[1, 4]] = float("nan")
    with pytest.raises(FloatingPointError, match="On sample 1, the embeddings give"):
        representation_similarity(model, IDS)


def test_too_short_a_sample_is_refused():
    with pytest.raises(UsageError, match="samples of 3 tokens"):
        representation_similarity(pico_model(), IDS[:, :3])


def test_prompts_of_a_task_are_its_stock_prompts(tmp_path):
    rows = [{"goal": f"goal {n}", "sol1": "one way", "sol2": "another", "label": 0} for n in range(3)]
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = task_prompts("piqa", str(tmp_path), limit=2)
    assert prompts == ["Question: goal 0\nAnswer:", "Question: goal 1\nAnswer:"]
    embedded = task_prompts("embedded_docstrings", limit=4)
    assert len(set(embedded)) == 4
    with pytest.raises(UsageError, match="Did you mean"):
        task_prompts("pica", str(tmp_path))
