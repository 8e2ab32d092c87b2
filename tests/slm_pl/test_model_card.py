import dataclasses

import pytest

from slm_pl.compression import surgery
from slm_pl.compression.plan import Base, DropLayers, Method, Plan
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


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_other_programs_where_they_apply(model_type):
    model, plans = dropped(model_type)
    card = card_of(model, plans)
    assert "vllm serve ." in card
    assert ("convert_hf_to_gguf.py" in card) is (model_type == "llama")
    commands = [line for line in card.splitlines() if line.startswith("python main.py ")]
    assert len(commands) == (model_type == "llama")
    for command in commands:
        assert export_parser().parse_args(command.split()[3:]).directory == "DIRECTORY"
    assert "vllm serve" not in model_card(model, plans, False, [], "float32", "int8")


def test_texts_of_a_stranger_stay_text():
    method = Method("evil`|\n\n# Head\n<script>", {"a": "`</td>|x"})
    model, plans = dropped(method=method)
    card = card_of(model, plans, no_map="a `b`\n# c")
    assert "\n# Head" not in card
    assert "\n# c" not in card
    (line,) = [line for line in card.splitlines() if line.startswith("| 1 |")]
    assert line.count("`") == 2
    assert line.replace("\\|", "").count("|") == 4


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "\ud800", "", "some/model"])
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
