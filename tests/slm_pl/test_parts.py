"""Configs that are put together from parts."""

import pytest

from slm_pl import parts
from slm_pl.errors import UsageError


def test_parts_are_put_in_their_place(tmp_path):
    (tmp_path / "parts" / "deep").mkdir(parents=True)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "parts" / "model.yaml").write_text("pretrained: a/b\nlearning_rate: 1e-4\n")
    (tmp_path / "parts" / "recipe.yaml").write_text("data: deep/data.yaml\nmodel: {lora: {r: 8, alpha: 16}}\n")
    (tmp_path / "parts" / "deep" / "data.yaml").write_text("path: rows.json\n")
    (tmp_path / "parts" / "hook.yaml").write_text("class_path: callbacks.ZeroShot\ninit_args: {tasks: [own.yaml]}\n")
    (tmp_path / "sweeps" / "s.yaml").write_text(
        "model: ../parts/model.yaml\nmeasure: [../parts/hook.yaml]\n"
        "recovery: [../parts/recipe.yaml, {model: {lora: {r: 4}}, trainer: {max_steps: 3}}]\n"
    )
    assert parts.read(tmp_path / "sweeps" / "s.yaml") == {
        "model": {"pretrained": "a/b", "learning_rate": 1e-4},
        "measure": [{"class_path": "callbacks.ZeroShot", "init_args": {"tasks": ["own.yaml"]}}],
        "recovery": {
            "data": {"path": "rows.json"},
            "model": {"lora": {"r": 4, "alpha": 16}},
            "trainer": {"max_steps": 3},
        },
    }
    (tmp_path / "parts" / "deep" / "data.yaml").write_text("x: ../recipe.yaml\n")
    with pytest.raises(UsageError, match="a part of itself"):
        parts.read(tmp_path / "sweeps" / "s.yaml")
    (tmp_path / "parts" / "deep" / "data.yaml").unlink()
    with pytest.raises(UsageError, match=r"data.yaml, which .*recipe.yaml names"):
        parts.read(tmp_path / "sweeps" / "s.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UsageError, match="holds a list"):
        parts.read(tmp_path / "list.yaml")


def test_a_file_lies_on_its_parts_and_adds_to_their_lists(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model.yaml").write_text("model: {pretrained: a/b, dtype: float32}\nratio: 0.1\n")
    (tmp_path / "parts" / "method.yaml").write_text("trainer: {callbacks: [hook.yaml]}\n")
    (tmp_path / "parts" / "hook.yaml").write_text("class_path: callbacks.SLEB\n")
    (tmp_path / "parts" / "run.yaml").write_text(
        "parts: [base.yaml]\ntrainer: {callbacks+: [hook.yaml], strategy: ddp}\n"
    )
    (tmp_path / "parts" / "base.yaml").write_text("trainer: {devices: 8, callbacks+: [{class_path: First}]}\n")
    whole = tmp_path / "whole.yaml"
    whole.write_text(
        "parts: [parts/model.yaml, parts/method.yaml, parts/run.yaml]\n"
        "model: {dtype: bfloat16}\ntrainer: {callbacks+: [{class_path: Last}]}\n"
    )
    names = ("callbacks.SLEB", "First", "callbacks.SLEB", "Last")
    assert parts.read(whole) == {
        "model": {"pretrained": "a/b", "dtype": "bfloat16"},
        "ratio": 0.1,
        "trainer": {"devices": 8, "strategy": "ddp", "callbacks": [{"class_path": name} for name in names]},
    }
    # With nothing below it, it is the list; without the plus, it takes the place of what is below.
    assert parts.read(tmp_path / "parts" / "base.yaml")["trainer"]["callbacks"] == [{"class_path": "First"}]
    whole.write_text("parts: [parts/method.yaml, parts/run.yaml]\ntrainer: {callbacks: []}\n")
    assert parts.read(whole)["trainer"]["callbacks"] == []
    for content, said in (
        ("parts: a.yaml", "takes a list of paths"),
        ("parts: [1]", "takes a list of paths"),
        ("parts: [parts/model.yaml]\nmodel+: [1]", "adds a list to a dict"),
        ("parts: [parts/method.yaml]\ntrainer: {callbacks+: 3}", "adds a int to a list"),
        ("parts: [whole.yaml]", "part of itself"),
    ):
        (tmp_path / "a.yaml").write_text("a\n")
        whole.write_text(content)
        with pytest.raises(UsageError, match=said):
            parts.read(whole)


def test_keys_that_are_no_text_and_arguments_stay_as_they_are(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "trainer:\n  callbacks: [a]\n  callbacks+: [b]\n  plugins+: [c]\n"
        "hook: {class_path: X, init_args: {scheduling: {4: 2}, models: {big+: 1, big: 2}}}\n"
    )
    hook = {"class_path": "X", "init_args": {"scheduling": {4: 2}, "models": {"big+": 1, "big": 2}}}
    assert parts.read(path) == {"trainer": {"callbacks": ["a", "b"], "plugins": ["c"]}, "hook": hook}
    assert parts.read(path, settled=False)["trainer"]["plugins+"] == ["c"]


def test_keys_beside_no_class_are_arguments_of_the_one_that_is_named():
    short, named = {"calibration": {"samples": 3}}, {"class_path": "Text", "init_args": {"source": "a.txt"}}
    both = {"class_path": "Text", "init_args": {"calibration": {"samples": 3}, "source": "a.txt"}}
    assert parts.merge({"data": short}, {"data": named}) == {"data": both}
    assert parts.merge({"data": named}, {"data": short}) == {"data": both}


def test_another_class_takes_the_place_of_one():
    base = {"strategy": {"class_path": "A", "init_args": {"x": 1}}, "data": {"class_path": "A", "init_args": {"x": 1}}}
    over = {"strategy": {"class_path": "B"}, "data": {"class_path": "A", "init_args": {"y": 2}}}
    assert parts.merge(base, over) == {
        "strategy": {"class_path": "B"},
        "data": {"class_path": "A", "init_args": {"x": 1, "y": 2}},
    }
