"""Every shipped configuration, and every command of the README, is one that the program takes."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import callbacks
from slm_pl import parts
from slm_pl.cli import main
from slm_pl.commands import compare_parser, data_parser, sweep_parser
from slm_pl.demo.command import demo_parser, label_models
from slm_pl.estimate.command import estimate_parser
from slm_pl.gguf_export import export_parser

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(ROOT.glob("configs/quickstart*.yaml"))  # the others: test_published_configs.py
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def parses(arguments: list[str], capsys) -> dict:
    """Parses a command without running it; returns what it would run with."""
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--print_config"])
    out = capsys.readouterr()
    assert done.value.code in (0, None), out.err
    return yaml.safe_load(out.out)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
@pytest.mark.parametrize("command", ["fit", "test", "prune"])
def test_config_is_valid_and_its_methods_take_their_arguments(path, command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parses([command, "--config", str(path.relative_to(ROOT))], capsys)
    assert config["config_version"] == 1
    for callback in config["trainer"]["callbacks"]:
        module, _, name = callback["class_path"].rpartition(".")
        method = getattr(callbacks, name) if module == "callbacks" else object
        if issubclass(method, callbacks.CompressionCallback):
            method(**callback["init_args"])
    assert yaml.safe_load(path.read_text())["config_version"] == 1  # written down, not defaulted


def test_published_recipe_is_in_the_llama_config(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parses(["fit", "--config", "configs/llama2_13b_slm.yaml"], capsys)
    trainer, model, data = config["trainer"], config["model"], config["data"]["init_args"]
    assert (data["global_batch_size"], trainer["accumulate_grad_batches"]) == (64, 1)
    strategy = trainer["strategy"]
    assert strategy["class_path"] == "lightning.pytorch.strategies.DeepSpeedStrategy"
    assert (strategy["init_args"]["stage"], strategy["init_args"]["exclude_frozen_parameters"]) == (2, True)
    assert (trainer["precision"], trainer["max_epochs"]) == ("bf16-true", 2)
    assert (model["learning_rate"], model["warmup_steps"]) == (1e-4, 100)
    assert (model["lora"]["r"], model["lora"]["alpha"], model["lora"]["dropout"]) == (8, 16, 0.05)
    assert (data["path"], data["cutoff"], data["val_size"]) == ("yahma/alpaca-cleaned", 256, 2000)
    merging = trainer["callbacks"][0]["init_args"]
    assert (merging["consolidation"], merging["other_parameters"]) == ("keep_top", "bottom")
    assert config["ratio"] == 0.2


def within(part: dict, whole: dict) -> bool:
    """Whether all that a part says is so in a whole; lists aside."""
    return all(
        within(value, whole.get(key) or {}) if isinstance(value, dict) else value == whole.get(key)
        for key, value in part.items()
        if not isinstance(value, list)
    )


def test_published_recipe_as_a_part_is_that_of_the_llama_config_and_combines(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    recipe = yaml.safe_load((ROOT / "configs/parts/recipe_lora_alpaca.yaml").read_text())
    whole = parts.read(ROOT / "configs/llama2_13b_slm.yaml")
    assert within(recipe, whole)
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "config_version: 1\nmodel: {pretrained: some/model}\ndata: {batch_size: 2}\ntrainer: {devices: 4}\n"
    )
    words = ["fit", "--config", "configs/parts/recipe_lora_alpaca.yaml", "--config", str(mine)]
    strategy = "configs/parts/strategy_deepspeed_3.yaml"
    config = parses([*words, "--trainer.strategy", strategy], capsys)
    assert within({"r": 8, "alpha": 16, "dropout": 0.05, "target_modules": None}, config["model"]["lora"])
    data = config["data"]["init_args"]
    assert (data["global_batch_size"], data["cutoff"], data["val_size"], data["batch_size"]) == (64, 256, 2000, 2)
    trainer = config["trainer"]
    assert (trainer["devices"], trainer["max_epochs"], trainer["precision"]) == (4, 2, "bf16-true")
    assert trainer["strategy"]["init_args"]["stage"] == 3


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/parts/strategy_*.yaml")), ids=lambda p: p.stem)
def test_every_strategy_can_be_made(path):
    import importlib

    part = yaml.safe_load(path.read_text())
    if "deepspeed" in path.stem:
        pytest.importorskip("deepspeed", reason="DeepSpeed is an optional dependency")
    module, _, name = part["class_path"].rpartition(".")
    strategy = getattr(importlib.import_module(module), name)(**part["init_args"])
    if "deepspeed" in path.stem:
        assert strategy.exclude_frozen_parameters
        assert str(strategy.config["zero_optimization"]["stage"]) == path.stem.removesuffix("_offload")[-1]
        kind = {"deepspeed_2_offload": "offload_optimizer", "deepspeed_3_offload": "offload_param"}
        found = {name for name in strategy.config["zero_optimization"] if name.startswith("offload")}
        assert found == {kind[name] for name in kind if path.stem.endswith(name)}


def test_ratio_is_given_to_the_methods_of_a_config_and_run_is_its_directory(pico_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    config = tmp_path / "mine.yaml"
    two = [
        {"class_path": "callbacks.SlidingWindowMerging", "init_args": {"remove_layers": 1}},
        {"class_path": "callbacks.LLMPruner", "init_args": {"layer_ratio": 0.1, "attention_layers": [0, None]}},
    ]
    two[1]["init_args"]["mlp_layers"] = [0, None]
    export = {"class_path": "callbacks.ExportCheckpoint", "init_args": {"output_dir": "{run}/made"}}
    whole = {
        "config_version": 1,
        "parts": [str(ROOT / "configs/quickstart_prune.yaml")],
        "model": {"pretrained": str(pico_dir)},
        "trainer": {"default_root_dir": str(tmp_path / "run"), "callbacks": [*two, export]},
    }
    config.write_text(yaml.safe_dump(whole))
    main(["prune", "--config", str(config), "--ratio", "0.3"])
    saved = yaml.safe_load((tmp_path / "run" / "config_prune.yaml").read_text())
    each = 1 - 0.7**0.5
    first, second = (callback["init_args"] for callback in saved["trainer"]["callbacks"][:2])
    assert (first["ratio"], first["remove_layers"]) == (pytest.approx(each), None)
    assert (second["ratio"], second["layer_ratio"]) == (pytest.approx(each), None)
    plans = [json.loads((tmp_path / "run" / "made" / name).read_text()) for name in ("plan.json", "plan.2.json")]
    assert [plan["method"]["class_path"] for plan in plans] == [callback["class_path"] for callback in two]

    config.write_text(yaml.safe_dump({**whole, "trainer": {**whole["trainer"], "callbacks": [export]}}))
    planned = [{"class_path": "callbacks.SLEB", "init_args": {"plan_path": "plan.json"}}]
    for value, said in (("0.3", "no callback removes a share"), ("1.2", "it is a share"), ("0.2", "a plan is given")):
        with pytest.raises(SystemExit) as done:
            main(["prune", "--config", str(config), "--ratio", value, "--overwrite"])
        assert done.value.code == 1
        assert said in capsys.readouterr().err
        methods = two if value == "0.3" else planned
        config.write_text(yaml.safe_dump({**whole, "trainer": {**whole["trainer"], "callbacks": methods}}))


def test_one_config_adds_to_the_lists_of_the_one_before_and_names_files_beside_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "text.yaml").write_text("{source: books.txt, samples: 3}\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "trainer: {callbacks+: [{class_path: callbacks.RepresentationSimilarity, init_args: {text: text.yaml}}]}\n"
        "data: {calibration: text.yaml}\n"
    )
    config = parses(["fit", "--config", "configs/quickstart.yaml", "--config", str(mine)], capsys)
    names = [callback["class_path"] for callback in config["trainer"]["callbacks"]]
    assert names[0] == "callbacks.SlidingWindowMerging"
    assert names[-1] == "callbacks.RepresentationSimilarity"
    assert len(names) == 5
    for text in (config["data"]["init_args"]["calibration"], config["trainer"]["callbacks"][-1]["init_args"]["text"]):
        assert (text["source"], text["samples"]) == ("books.txt", 3)


def readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:bash|console|sh)\n(.*?)```", README, flags=re.S)
    joined = "".join(blocks).replace("\\\n", " ")
    return [line.partition(" # ")[0].strip() for line in joined.splitlines() if line.strip() and line[0] != "#"]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_command_is_valid(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == "make":
        for target in words[1:]:
            assert re.search(rf"^{target}:", MAKEFILE, flags=re.M), f"no target {target}"
    elif words[:2] == ["python", "main.py"] and words[2] == "compare":
        assert compare_parser().parse_args(words[3:]).results
    elif words[:3] == ["python", "main.py", "data"]:
        assert data_parser().parse_args(words[3:]).output
    elif words[:3] == ["python", "main.py", "demo"]:
        assert label_models(demo_parser().parse_args(words[3:]).models)
    elif words[:3] == ["python", "main.py", "export"]:
        assert export_parser().parse_args(words[3:]).to == "gguf"
    elif words[:3] == ["python", "main.py", "estimate"]:
        assert all((ROOT / path).is_file() for path in estimate_parser().parse_args(words[3:]).config)
    elif words[:3] == ["python", "main.py", "sweep"]:
        assert sweep_parser().parse_args(words[3:]).methods
    elif words[:2] == ["python", "main.py"] and "--help" not in words:
        assert parses(words[2:], capsys)["trainer"]
    elif words[:4] == ["python", "-m", "pip", "install"]:
        extra = re.search(r"\[(\w+)\]", command)
        assert extra is None or re.search(rf"^{extra[1]} = ", (ROOT / "pyproject.toml").read_text(), flags=re.M)
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
    else:
        assert command == "source .venv/bin/activate" or words[-1] == "--help"


def test_readme_shows_the_row_names_of_the_report():
    from slm_pl.report import comparison, generation_rows

    source = "".join(Path(module.__file__).read_text() for module in (comparison, generation_rows))
    names = ("Decoder layers", "Parameters", "Latency, median", "Time per output token, median", "Output tokens/s")
    for name in (*names, "Peak memory"):
        assert name in README
        assert name in source


@pytest.mark.parametrize("name", ["published", "sum", "mean", "keep_bottom", "cka"])
def test_quickstart_of_each_variant_runs_from_yaml_alone(name, pico_dir, tmp_path, monkeypatch):
    """As shipped, but for the model, the size and the place."""
    monkeypatch.chdir(ROOT)
    size = (
        ["--trainer.callbacks.threshold", "-0.5"] if name == "published" else ["--trainer.callbacks.remove_layers", "2"]
    )
    place = ["--model.pretrained", str(pico_dir), "--trainer.default_root_dir", str(tmp_path)]
    main(["test", "--config", f"configs/quickstart_{name}.yaml", *place, *size])
    plan = json.loads((tmp_path / "plan.json").read_text())
    results = json.loads((tmp_path / "results.json").read_text())
    removed = sum(step["high"] - step["low"] for step in plan["steps"])
    assert removed == (4 if name == "published" else 2)
    assert results["model"]["num_layers"] == 6 - removed
    assert results["perplexity"][0]["tokens"] == 32 * 127
    assert (tmp_path / "search_trace.png").stat().st_size > 10_000
    method = plan["method"]["init_args"]
    expected = {
        "published": ("keep_top", "bottom", "cosine"),
        "sum": ("sum", "top", "cosine"),
        "mean": ("mean", "mean", "cosine"),
        "keep_bottom": ("keep_bottom", "bottom", "cosine"),
        "cka": ("keep_top", "top", "cka"),
    }
    assert (method["consolidation"], method["other_parameters"], method["similarity"]) == expected[name]


@pytest.mark.long
def test_quickstart_of_least_squares_runs_from_yaml_alone(pico_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    place = ["--model.pretrained", str(pico_dir), "--trainer.default_root_dir", str(tmp_path)]
    refit = ["--trainer.callbacks.least_squares.ridge", "[3.0]", "--data.fitting", "[{samples: 4, sampling: stream}]"]
    main(
        ["test", "--config", "configs/quickstart_least_squares.yaml", *place, *refit]
        + ["--trainer.callbacks.remove_layers", "2"]
    )
    plan = json.loads((tmp_path / "plan.json").read_text())
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["model"]["num_layers"] == 4
    assert plan["outcome"]["least_squares"]["fits"]
    assert plan["method"]["init_args"]["least_squares"]["ridge"] == [3.0]
    assert {row["phase"] for row in plan["trace"]} == {0, 1}
    assert (tmp_path / "block_importance.png").stat().st_size > 10_000


def test_quickstart_of_the_layer_comparison_runs_from_yaml_alone(pico_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    place = ["--model.pretrained", str(pico_dir), "--trainer.default_root_dir", str(tmp_path)]
    main(["test", "--config", "configs/quickstart_similarity.yaml", *place])
    record = json.loads((tmp_path / "representation_similarity.json").read_text())
    assert (len(record["matrix"]), record["protocol"]["samples"]) == (6, 16)
    assert record["protocol"]["text"] == "embedded_docstrings"


@pytest.mark.usefixtures("one_thread")
def test_quickstart_of_speed_runs_from_yaml_alone(pico_dir, tmp_path, monkeypatch):
    """As shipped, but for the model, the batches and the repeats."""
    monkeypatch.chdir(ROOT)
    place = ["--model.pretrained", str(pico_dir), "--trainer.default_root_dir", str(tmp_path)]
    less = ["--trainer.callbacks.batch_size", "[1, 2]", "--trainer.callbacks.repeats", "2"]
    main(["test", "--config", "configs/quickstart_speed.yaml", *place, *less, "--baseline", str(pico_dir)])
    points = json.loads((tmp_path / "results.json").read_text())["efficiency"]
    shape = [(one["protocol"], one["batch_size"], one["prompt_tokens"], one["new_tokens"]) for one in points]
    assert shape == [("serving", batch, 64, 32) for batch in (1, 2)]
    assert all(one["paired"]["promise"]["layers"] == 1 for one in points)


DEPTH = {
    "slm": {},
    "sleb": {},
    "shortened_perplexity": {"protect_first": 1, "protect_last": 1},
    "shortened_taylor": {"protect_first": 1, "protect_last": 1},
    "shortened_magnitude": {"protect_first": 1, "protect_last": 1},
    "block_influence": {},
    "angular": {},
    "reverse": {},
    "random": {},
    "layers": {"layers": [1, 3]},
}
"""Beside the size, what a model of six layers needs."""


@pytest.mark.parametrize("name", DEPTH)
def test_quickstart_of_each_depth_method_runs_from_yaml_alone(name, pico_dir, tmp_path, monkeypatch):
    """As shipped, but for the model, the size and the place."""
    monkeypatch.chdir(ROOT)
    options = DEPTH[name] if "layers" in DEPTH[name] else {"remove_layers": 2, **DEPTH[name]}
    changes = [word for key, value in options.items() for word in (f"--trainer.callbacks.{key}", str(value))]
    place = ["--model.pretrained", str(pico_dir), "--trainer.default_root_dir", str(tmp_path / name)]
    main(["test", "--config", f"configs/quickstart_{name}.yaml", *place, *changes])
    results = json.loads((tmp_path / name / "results.json").read_text())
    assert (results["model"]["label"], results["model"]["num_layers"]) == (name, 4)
    assert results["perplexity"][0]["tokens"] == 32 * 127
    assert results["efficiency"][0]["new_tokens"] == 32
    plan = json.loads((tmp_path / name / "plan.json").read_text())
    assert plan["outcome"]["removed_layers"] == 2
    drawn = {path.name for path in (tmp_path / name).glob("*.png")}
    kind = "search_trace.png" if name == "slm" else "block_importance.png"
    assert drawn == {"efficiency.png", *([] if name in ("reverse", "random", "layers") else [kind])}


WIDTH = ("llm_pruner", "llm_pruner_uniform", "llm_pruner_channel", "flap", "wanda_structured")


@pytest.mark.parametrize("name", [*WIDTH, "slm_llm_pruner", "llm_pruner_slm"])
def test_quickstart_of_each_width_method_runs_from_yaml_alone(name, pico_dir, tmp_path, monkeypatch):
    """As shipped, but for the model, the size and the place."""
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "configs" / f"quickstart_{name}.yaml").read_text())
    for part in ("model", "data"):
        config[part] = yaml.safe_load((ROOT / "configs" / config[part]).read_text())
    config["model"]["pretrained"] = str(pico_dir)
    trainer = config["trainer"]
    trainer["default_root_dir"] = str(tmp_path / name)
    hooks = [one for one in trainer["callbacks"] if isinstance(one, str)]
    methods = [one for one in trainer["callbacks"] if not isinstance(one, str)]
    for method in methods:
        arguments = method["init_args"]
        if method["class_path"] == "callbacks.LLMPruner" and not {"uniform", "scope"} & set(arguments):
            arguments.update(attention_layers=[0, None], mlp_layers=[0, None])
    trainer["callbacks"] = [yaml.safe_load((ROOT / "configs" / hook).read_text()) for hook in hooks] + methods
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config", str(tmp_path / "config.yaml")])
    results = json.loads((tmp_path / name / "results.json").read_text())["model"]
    plans = [json.loads(path.read_text()) for path in sorted((tmp_path / name).glob("plan*.json"))]
    assert len(plans) == len(methods)
    assert (results["label"], results["num_layers"]) == (name, 6 - 3 * (len(methods) == 2))
    ratio = next(one["init_args"]["ratio"] for one in methods if "ratio" in one["init_args"])
    (width,) = (plan for plan in plans if "ratio" in plan["outcome"])
    # A KV group is 2 % of this model; of its 32 hidden channels four have to go at a time, as it has four heads.
    assert width["outcome"]["ratio"] == pytest.approx(ratio, abs=0.02 if "channel" not in name else 4 / 32 / 2)
    assert width["outcome"]["requested_ratio"] == ratio
    assert results["requested_ratio"] == (ratio if len(methods) == 1 else None)
    drawn = {path.name for path in (tmp_path / name).glob("*.png")}
    number = ".2" if name == "slm_llm_pruner" else ""
    assert f"layer_widths{number}.png" in drawn
    if len(methods) == 1:
        assert (
            results["num_parameters"] == plans[0]["base"]["num_parameters"] - plans[0]["outcome"]["removed_parameters"]
        )


def test_compare_methods_runs_every_method_at_one_size():
    (names,) = re.findall(r"^METHODS := ((?:.*\\\n)*.*)$", MAKEFILE, flags=re.M)
    names = names.replace("\\\n", " ").split()
    assert set(names) == (set(DEPTH) - {"layers"}) | set(WIDTH) | {"slm_llm_pruner"}
    for name in names:
        config = yaml.safe_load((ROOT / "configs" / f"quickstart_{name}.yaml").read_text())
        assert config["trainer"]["default_root_dir"] == f"runs/methods/{name}"
        arguments = config["trainer"]["callbacks"][-1]["init_args"]
        if name in DEPTH:
            assert arguments["remove_layers"] == 6
        elif name in WIDTH:
            # Six of SmolLM2's 30 layers: 6 x 3,540,096 of 134,515,008 parameters.
            assert arguments["ratio"] == pytest.approx(6 * 3_540_096 / 134_515_008, abs=1e-5)
        else:
            assert config["trainer"]["callbacks"][-2]["init_args"]["remove_layers"] == 3
            assert arguments["ratio"] == pytest.approx(3 * 3_540_096 / (134_515_008 - 3 * 3_540_096), abs=2e-5)
