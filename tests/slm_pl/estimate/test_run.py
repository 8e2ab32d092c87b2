"""The command ``estimate``."""

import json
import re
from pathlib import Path

import pytest
import yaml

from slm_pl import cli, trainer_cli
from slm_pl.compression.plan import count_parameters
from slm_pl.errors import UsageError
from slm_pl.estimate.run import QUESTIONS, estimate, gpus_of, strategy_of
from slm_pl.export import load_compressed
from tests.helpers.pico import pico_model
from tests.helpers.shared import SHARED, needs_shared
from tests.helpers.tokenizer import pico_tokenizer

ROOT = Path(__file__).resolve().parents[3]


def printed(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code and what was printed."""
    code = 0
    try:
        cli.main(["estimate", *words])
    except SystemExit as done:
        code = int(done.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def table_of(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture
def pico(tmp_path):
    pico_model(bos_token_id=0, eos_token_id=1, pad_token_id=2).save_pretrained(tmp_path / "model")
    pico_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def config_of(pico: Path, **trainer: object) -> Path:
    method = {"class_path": "callbacks.SLEB", "init_args": {"remove_layers": 2}}
    content = {
        "model": {"pretrained": str(pico), "dtype": "float32"},
        "data": {"path": "embedded", "calibration": {"samples": 4, "sequence_length": 16}, "val_size": 2},
        "trainer": {"max_steps": 3, "callbacks": [method], **trainer},
    }
    path = pico.parent / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_llama2_13b(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "120")
    code, out, err = printed(capsys, "--config", "configs/llama2_13b_slm.yaml")
    assert code == 0, err
    assert "llama2_13b_slm: 13.02 → 10.48 billion parameters" in out
    rows = table_of(out)
    assert list(rows)[2:] == ["search", "recovery", "speed", "perplexity", "zero-shot", "all"]
    # The table of README for DeepSpeed stage 2: 22.0 GB.
    assert float(rows["recovery"][3]) == pytest.approx(22.0, abs=0.1)
    assert float(rows["search"][3]) > 26.0
    hours = [float(row[5]) for name, row in rows.items() if name not in ("phase", "all") and "-" not in row[0]]
    assert float(rows["all"][5]) == pytest.approx(sum(hours), abs=0.03)


def test_ratio_machine_and_utilisation(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "120")
    words = ["--config", "configs/llama2_7b_llm_pruner.yaml", "configs/llama2_7b_flap.yaml"]
    _, slow, _ = printed(capsys, *words)
    code, fast, err = printed(capsys, *words, "--ratio", "0.35", "--machine", "h100", "--utilisation", "0.8")
    assert code == 0, err
    assert re.findall(r"→ ([\d.]+) billion", slow) == ["5.39", "5.39"]
    assert re.findall(r"→ ([\d.]+) billion", fast) == ["4.38", "4.38"]
    assert "80% of 989.4 TFLOP/s" in fast


def test_model_on_this_machine(capsys, pico):
    code, out, err = printed(capsys, "--config", str(config_of(pico)))
    assert code == 0, err
    assert "run: 0.00 → 0.00 billion parameters" in out
    assert "least squares" not in out


def run_of(path: Path) -> dict:
    return trainer_cli.whole_config("fit", str(path), names_data=False)


def test_what_is_not_known_is_said(pico, tmp_path):
    hooks = [
        {"class_path": "callbacks.ZeroShot", "init_args": {"tasks": ["piqa", "gsm8k"]}},
        {"class_path": "callbacks.Perplexity", "init_args": {"texts": [{"source": "ptb"}, {"preset": "sleb"}]}},
        {"class_path": "callbacks.SlidingWindowMerging", "init_args": {"threshold": 0.7}},
    ]
    found = estimate("run", run_of(config_of(pico, callbacks=hooks, max_steps=-1)))
    said = "\n".join(found.left_out)
    for word in ("gsm8k", "perplexity of ptb", "SlidingWindowMerging removes", "give trainer.max_steps"):
        assert word in said
    assert found.parameters[0] == found.parameters[1]
    assert [phase.name for phase in found.phases] == ["search", "zero-shot", "perplexity"]
    hooks[0]["init_args"]["tasks"] = ["piqa"]
    one = estimate("run", run_of(config_of(pico, callbacks=hooks[:1])))
    assert one.phases[-1].flops == found.phases[1].flops  # gsm8k is in neither


def test_layers_that_are_refitted(pico):
    method = {"class_path": "callbacks.SLEB", "init_args": {"remove_layers": 2, "consolidation": "least_squares"}}
    found = estimate("run", run_of(config_of(pico, callbacks=[method])))
    assert [phase.name for phase in found.phases] == ["search", "least squares", "recovery"]
    assert found.phases[1].flops64 > 0 == found.phases[0].flops64


def test_streaming(pico):
    path = config_of(pico)
    whole = estimate("run", run_of(path))
    content = yaml.safe_load(path.read_text())
    content["model"]["streaming"] = True
    path.write_text(yaml.safe_dump(content))
    streamed = estimate("run", run_of(path))
    assert streamed.phases[0].memory < whole.phases[0].memory
    assert any("streaming" in reason for reason in streamed.left_out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--utilisation", "0"], "--utilisation is 0.0; it is a share"),
        (["--architecture", "{}/none.json"], "is no config of a model"),
        (["--architecture", "{}/broken.json"], "is no config of a model"),
        (["--architecture", "{}/unknown.json"], "is no config of a model"),
        (["--architecture", "{}/list.json"], "is no config of a model: .*it is a list"),
        (["--ratio", "1.5"], "ratio is 1.5"),
    ],
)
def test_wrong_options(words, message, capsys, pico):
    (pico / "broken.json").write_text('{"model_type": ')
    (pico / "unknown.json").write_text(json.dumps({"model_type": "no such"}))
    (pico / "list.json").write_text(json.dumps(["llama"]))
    code, out, err = printed(capsys, "--config", str(config_of(pico)), *(word.format(pico) for word in words))
    assert code != 0
    assert re.search(message, err)
    assert not table_of(out)


def test_wrong_configs(capsys, pico, tmp_path):
    code, _, err = printed(capsys, "--config", str(tmp_path / "none.yaml"))
    assert code == 1
    assert "There is no config file" in err
    plan = [{"class_path": "callbacks.SLEB", "init_args": {"plan_path": "plan.json"}}]
    code, _, err = printed(capsys, "--config", str(config_of(pico, callbacks=plan)))
    assert code == 1
    assert "SLEB has a plan_path" in err
    code, _, err = printed(capsys, "--config", str(config_of(pico, max_stepz=3)))
    assert code != 0
    assert "max_stepz" in err


@pytest.mark.parametrize(
    ("devices", "nodes", "count"),
    [(8, 1, 8), ([0, 2], 2, 4), ("auto", 1, None), (-1, 1, None), ("4", 1, 4), ("0,1,5", 2, 6), (None, None, None)],
)
def test_processes(devices, nodes, count):
    assert gpus_of({"devices": devices, "num_nodes": nodes}) == count


@pytest.mark.parametrize(
    ("strategy", "gpus", "expected"),
    [
        ("auto", 1, ("single_device", False, 0)),
        ("auto", 2, ("ddp", False, 0)),
        ("deepspeed", 2, ("deepspeed_stage_2", False, 200_000_000)),
        ("deepspeed_stage_2_offload", 2, ("deepspeed_stage_2", True, 200_000_000)),
        ("deepspeed_stage_3_offload", 2, ("deepspeed_stage_3_offload", False, 200_000_000)),
        ("strategy_ddp", 2, ("ddp", False, 0)),
        ("strategy_deepspeed_2", 8, ("deepspeed_stage_2", False, 50_000_000)),
        ("strategy_deepspeed_2_offload", 8, ("deepspeed_stage_2", True, 50_000_000)),
        ("strategy_deepspeed_3_offload", 8, ("deepspeed_stage_3_offload", False, 50_000_000)),
    ],
)
def test_strategies(strategy, gpus, expected):
    part = ROOT / "configs" / "parts" / f"{strategy}.yaml"
    given = yaml.safe_load(part.read_text()) if part.is_file() else strategy
    assert strategy_of({"strategy": given}, gpus) == expected


@pytest.mark.parametrize("strategy", ["fsdp", {"class_path": "DeepSpeedStrategy", "init_args": {"stage": 0}}])
def test_strategies_without_formulas(strategy):
    with pytest.raises(UsageError, match="no formulas"):
        strategy_of({"strategy": strategy}, 2)


SEQUENCES = {
    "depth and depth": [("SLEB", {"ratio": 0.3}), ("BlockInfluence", {"ratio": 0.3})],
    "width and depth": [("FLAP", {"ratio": 0.3}), ("BlockInfluence", {"remove_layers": 2})],
    "depth and width": [("SlidingWindowMerging", {"remove_layers": 2}), ("FLAP", {"ratio": 0.2})],
    "layers named": [("LayerRemoval", {"layers": [1, 2]})],
    "a part of the layers": [
        ("LLMPruner", {"layer_ratio": 0.5, "attention_layers": [2, -2], "mlp_layers": [2, -2]}),
    ],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_what_is_left_is_what_surgery_leaves(name, tmp_path):
    sizes = {"num_hidden_layers": 12, "num_key_value_heads": 4, "intermediate_size": 96}
    model = pico_model(bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes)
    model.save_pretrained(tmp_path / "model")
    pico_tokenizer().save_pretrained(tmp_path / "model")
    methods = [{"class_path": f"callbacks.{method}", "init_args": arguments} for method, arguments in SEQUENCES[name]]
    found = estimate("run", run_of(config_of(tmp_path / "model", callbacks=methods)))
    path = config_of(tmp_path / "model", callbacks=methods, default_root_dir=str(tmp_path / "run"), logger=False)
    content = yaml.safe_load(path.read_text())
    export = {"class_path": "callbacks.ExportCheckpoint", "init_args": {"output_dir": "{run}/export"}}
    content["trainer"] |= {"callbacks": [*methods, export], "accelerator": "cpu", "devices": 1}
    path.write_text(yaml.safe_dump(content))
    cli.main(["prune", "--config", str(path)])
    left = count_parameters(load_compressed(tmp_path / "run" / "export")[0])
    assert found.parameters[0] == count_parameters(model)
    assert found.parameters[1] == pytest.approx(left, rel=0.02)
    again = estimate("run", run_of(config_of(tmp_path / "run" / "export", callbacks=methods)))
    assert again.parameters[1] == again.parameters[0]
    assert sum("carries its plan" in reason for reason in again.left_out) == len(methods)


@pytest.mark.parametrize(
    ("trainer", "data", "steps", "validations"),
    [
        ({"max_steps": 30, "val_check_interval": 20}, {}, 30, 3),  # of 2 micro-batches a step, every ten steps
        ({"max_steps": -1, "max_epochs": 2, "val_check_interval": 0.25}, {"max_rows": 402}, 100, 8),
        ({"max_steps": 60, "max_epochs": 2}, {"max_rows": 402}, 60, 1),
        ({"max_steps": 500, "max_epochs": 2}, {"max_rows": 402}, 100, 2),
        ({"max_steps": 30}, {}, 30, 0),
        ({"max_steps": 30, "val_check_interval": "00:00:15:00"}, {}, 30, 0),
    ],
)
def test_steps_and_validations(trainer, data, steps, validations, pico):
    path = config_of(pico, callbacks=[], **trainer)
    content = yaml.safe_load(path.read_text())
    content["data"] |= {"batch_size": 4, "global_batch_size": 8, "cutoff": 64, "eval_batch_size": 2, **data}
    path.write_text(yaml.safe_dump(content))
    [phase] = estimate("run", run_of(path)).phases
    content["data"]["val_size"] = 0
    content["data"]["max_rows"] = data.get("max_rows", 2) - 2 or None
    path.write_text(yaml.safe_dump(content))
    [unwatched] = estimate("run", run_of(path)).phases
    weights = 4 * 79_000
    assert unwatched.bytes / (2 * 2 * steps) == pytest.approx(weights, rel=0.2)
    assert (phase.bytes - unwatched.bytes) / weights == pytest.approx(validations, rel=0.2)


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize("task", [name for name in QUESTIONS if name not in ("hellaswag", "embedded_docstrings")])
def test_questions_of_a_task(task):
    """The rows that lm-eval asks; of HellaSwag a part is there."""
    split = "test" if task.startswith(("arc", "openbook")) else "validation"
    lines = (SHARED / "data" / "lm_eval" / task / f"{split}.jsonl").read_text().splitlines()
    assert len(lines) == QUESTIONS[task][0]
