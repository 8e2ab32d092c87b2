"""Every shipped configuration, and every command of the README, is one that the program takes."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from slm_pl.cli import compare_parser, main

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
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
        if module.startswith("callbacks") and name == "SlidingWindowMerging":
            from callbacks import SlidingWindowMerging

            SlidingWindowMerging(**callback["init_args"])
    assert yaml.safe_load(path.read_text())["config_version"] == 1  # written down, not defaulted


def test_published_recipe_is_in_the_llama_config(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parses(["fit", "--config", "configs/llama2_13b_slm.yaml"], capsys)
    trainer, model, data = config["trainer"], config["model"], config["data"]
    assert data["batch_size"] * trainer["devices"] * trainer["accumulate_grad_batches"] == 64
    strategy = trainer["strategy"]
    assert strategy["class_path"] == "lightning.pytorch.strategies.DeepSpeedStrategy"
    assert (strategy["init_args"]["stage"], strategy["init_args"]["exclude_frozen_parameters"]) == (2, True)
    assert (trainer["precision"], trainer["max_epochs"]) == ("bf16-true", 2)
    assert (model["learning_rate"], model["warmup_steps"]) == (1e-4, 100)
    assert (model["lora"]["r"], model["lora"]["alpha"], model["lora"]["dropout"]) == (8, 16, 0.05)
    assert (data["path"], data["cutoff"], data["val_size"]) == ("yahma/alpaca-cleaned", 256, 2000)
    merging = trainer["callbacks"][0]["init_args"]
    assert (merging["threshold"], merging["other_parameters"]) == (0.72, "bottom")


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
    from slm_pl import comparison

    source = Path(comparison.__file__).read_text()
    for name in ("Decoder layers", "Parameters", "Latency, median", "Output tokens/s", "Peak memory"):
        assert name in README
        assert name in source
