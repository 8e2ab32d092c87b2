"""The command line as a user meets it: real parsing, real files, pico models."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import yaml

from slm_pl.cli import interruptible, main
from tests.helpers.pico import pico_model
from tests.helpers.tokenizer import pico_tokenizer

ROWS = [{"instruction": f"Say {i}", "input": "", "output": f"This is number {i}."} for i in range(12)]
TEXTS = [f"Sentence {i} of a text. " * 30 for i in range(8)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A pico model, Alpaca rows and texts, as files."""
    root = tmp_path_factory.mktemp("inputs")
    pico_model(num_hidden_layers=6, max_position_embeddings=512).save_pretrained(root / "model")
    pico_tokenizer().save_pretrained(root / "model")
    (root / "alpaca.json").write_text(json.dumps(ROWS))
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return root


@pytest.fixture
def arguments(inputs, tmp_path):
    """Writes a config for the pico model; changes are dotted keys. Returns the arguments of the command line."""

    def write(*changes: str, name: str = "config.yaml", callbacks: list | None = None, **top: object) -> list[str]:
        run = tmp_path / "run"
        config = {
            **top,
            "model": {"pretrained": str(inputs / "model"), "warmup_steps": 1},
            "data": {
                "path": str(inputs / "alpaca.json"),
                "val_size": 2,
                "cutoff": 64,
                "calibration": {"source": str(inputs / "texts.jsonl"), "samples": 3, "sequence_length": 16},
            },
            "trainer": {
                "default_root_dir": str(run),
                "accelerator": "cpu",
                "logger": False,
                "max_steps": 2,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                "callbacks": [
                    {"class_path": "callbacks.SlidingWindowMerging", "init_args": {"remove_layers": 2}},
                    {"class_path": "callbacks.ExportCheckpoint", "init_args": {"output_dir": str(run / "export")}},
                ]
                if callbacks is None
                else callbacks,
            },
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config))
        return ["--config", str(path), *changes]

    return write


def failure(capsys, args: list[str]) -> tuple[int, str]:
    """Runs a command that must fail; returns its status and what it said."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return caught.value.code, error


def test_prune_exports_the_size_that_was_asked_for(arguments, tmp_path, capsys):
    main(["prune", *arguments()])
    export = tmp_path / "run" / "export"
    assert json.loads((export / "config.json").read_text())["num_hidden_layers"] == 4
    assert (export / "plan.json").read_bytes() == (tmp_path / "run" / "plan.json").read_bytes()
    assert not (tmp_path / "run" / "results.json").exists()


def test_fit_as_it_is_by_default_logs_and_goes_on(arguments, tmp_path, caplog):
    """No loggers, no checkpoint directory, no progress bar settings: what a user has who writes none of them."""
    config = Path(arguments()[1])
    content = yaml.safe_load(config.read_text())
    for option in ("logger", "enable_progress_bar", "enable_checkpointing"):
        del content["trainer"][option]
    content["trainer"]["log_every_n_steps"] = 1
    config.write_text(yaml.safe_dump(content))
    run = tmp_path / "run"
    caplog.set_level("INFO")
    main(["fit", "--config", str(config), "--ckpt_path", "last"])
    assert "There is no checkpoint in" in caplog.text
    assert "litlogger" not in caplog.text  # Lightning's advertisements
    assert yaml.safe_load((run / "config_fit.yaml").read_text())["trainer"]["max_steps"] == 2
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["version_0"]
    names = [path.name for path in (run / "logs" / "version_0").iterdir()]
    assert "metrics.csv" in names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert len(list((run / "checkpoints").glob("*.ckpt"))) == 1
    main(["fit", "--config", str(config), "--ckpt_path", "last", "--trainer.max_steps", "3"])
    assert f"Restoring states from the checkpoint path at {run}/checkpoints/" in caplog.text
    assert (run / "logs" / "version_1" / "metrics.csv").is_file()
    main(["prune", "--config", str(config), "--overwrite"])
    assert not (run / "logs" / "version_2").exists()


def test_checkpoint_that_is_not_there_is_no_reason_to_measure_another_model(arguments, tmp_path, capsys):
    for command in ("test", "validate", "predict"):
        status, error = failure(capsys, [command, *arguments(), "--ckpt_path", "last"])
        assert status == 1
        assert "There is no checkpoint in" in error
    (tmp_path / "deepspeed.ckpt").mkdir()
    status, error = failure(capsys, ["fit", *arguments(), "--ckpt_path", str(tmp_path / "deepspeed.ckpt")])
    assert (status, "runs whatever code is pickled in it" in error) == (1, True)


def test_data_of_another_class_has_its_own_defaults(tmp_path, capsys):
    path = tmp_path / "text.yaml"
    path.write_text("model: {pretrained: a/b}\ndata: {class_path: slm_pl.data.TextDataModule, init_args: {seed: 5}}\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(path), "--data.source", "embedded", "--print_config"])
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert data["class_path"] == "slm_pl.data.TextDataModule"
    found = {name: data["init_args"][name] for name in ("source", "seed", "batch_size", "eval_batch_size", "val_size")}
    assert found == {"source": "embedded", "seed": 5, "batch_size": 1, "eval_batch_size": 1, "val_size": 100}


def test_fit_then_test_then_compare(arguments, inputs, tmp_path, capsys):
    hooks = [
        {
            "class_path": "callbacks.Perplexity",
            "init_args": {"texts": [{"source": str(inputs / "texts.jsonl"), "sequence_length": 16}]},
        },
        {"class_path": "callbacks.Efficiency", "init_args": {"new_tokens": 4, "warmup": 1, "repeats": 2}},
    ]
    main(["fit", *arguments()])
    export = tmp_path / "run" / "export"
    for label, model in (("dense", inputs / "model"), ("recovered", export)):
        changes = ("--model.pretrained", str(model), "--trainer.default_root_dir", str(tmp_path / "runs" / label))
        main(["test", *arguments(*changes, name="test.yaml", callbacks=hooks)])
    results = json.loads((tmp_path / "runs" / "recovered" / "results.json").read_text())
    assert results["model"]["label"] == "recovered"
    assert results["model"]["num_layers"] == 4
    assert results["model"]["base"] == str(inputs / "model")
    assert results["efficiency"][0]["new_tokens"] == 4
    assert results["perplexity"][0]["value"] > 1
    main(["compare", *(str(tmp_path / "runs" / x / "results.json") for x in ("dense", "recovered"))])
    assert "AutoModelForCausalLM" in capsys.readouterr().out.split("Load it with")[1]
    comparison = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    layers = next(row for row in comparison["rows"] if row["name"] == "num_layers")
    assert [cell["value"] for cell in layers["cells"]] == [6, 4]
    assert (tmp_path / "runs" / "comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_int8_is_measured_by_switch_and_as_an_export(arguments, inputs, tmp_path, capsys):
    pytest.importorskip("torchao", reason="torchao is an optional dependency")
    texts = [{"source": str(inputs / "texts.jsonl"), "sequence_length": 16}, {"source": "embedded", "max_tokens": 512}]
    hooks = [{"class_path": "callbacks.Perplexity", "init_args": {"texts": texts}}]
    run, export = tmp_path / "run", tmp_path / "run" / "export"
    merging = {"class_path": "callbacks.SlidingWindowMerging", "init_args": {"remove_layers": 2}}
    writing = {"class_path": "callbacks.ExportCheckpoint", "init_args": {"output_dir": str(export)}}
    int8 = {**writing["init_args"], "output_dir": str(run / "int8"), "quantization": "int8"}
    main(["prune", *arguments(callbacks=[merging, writing, {**writing, "init_args": int8}])])

    def measure(label: str, model: Path, *more: str, method: tuple = ()) -> dict:
        where = ("--model.pretrained", str(model), "--trainer.default_root_dir", str(tmp_path / label))
        main(["test", *arguments(*where, *more, name=f"{label}.yaml", callbacks=[*method, *hooks])])
        return json.loads((tmp_path / label / "results.json").read_text())

    plain = measure("plain", export)
    switched = measure("switched", export, "--model.quantization", "int8")
    # A method that the checkpoint has behind it is passed over; one that it has not is refused.
    loaded = measure("loaded", run / "int8", method=(merging,))
    assert "torchao" not in capsys.readouterr().err
    for name in ("num_layers", "num_parameters", "plan_sha256", "base", "requested_ratio"):
        assert loaded["model"][name] == switched["model"][name] == plain["model"][name]
    assert loaded["model"]["num_layers"] == 4
    for one, same, other in zip(loaded["perplexity"], switched["perplexity"], plain["perplexity"], strict=True):
        assert one["value"] == same["value"] != other["value"]
        assert one["value"] == pytest.approx(other["value"], rel=0.02)
    refused = ["test", *arguments("--model.quantization", "int8", "--overwrite", callbacks=[merging, *hooks])]
    status, error = failure(capsys, refused)
    assert status == 1
    assert "are quantised (int8 weight-only (torchao)) and cannot be cut or merged" in error
    status, error = failure(capsys, ["fit", *arguments("--model.pretrained", str(run / "int8"), "--overwrite")])
    assert status == 1
    assert "cannot be trained" in error
    assert failure(capsys, ["test", *arguments("--model.quantization", "int4")])[0] == 2


def test_predict_writes_completions(arguments, tmp_path):
    main(["predict", *arguments("--model.max_new_tokens", "3")])
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert len(predictions) == 2
    assert all(p["instruction"].startswith("Say ") and "completion" in p for p in predictions)


def swm(**init_args: object) -> list[dict]:
    return [{"class_path": "callbacks.SlidingWindowMerging", "init_args": init_args}]


@pytest.mark.parametrize(
    ("changes", "callbacks", "status", "messages"),
    [
        (["--model.pretrained", "./nowhere"], None, 1, ["There is no directory ./nowhere", "a Hub id"]),
        (["--model.pretrained", "model.gguf"], None, 1, ["There is no file model.gguf"]),
        (["--model.pretrained", "package:no_such_pkg/x.gguf"], None, 1, ["'no_such_pkg', which is not installed"]),
        (["--data.calibration.source", "none.txt"], None, 1, ["none.txt"]),
        (
            ["--data.calibration.sequence_length", "4000"],
            None,
            1,
            ["each from a document of its own", "calibration.sequence_length"],
        ),
        (["--data.calibration.samples", "0"], None, 1, ["samples is 0"]),
        (["--data.path", "none.json"], None, 1, ["none.json"]),
        ([], swm(threshold=1.5), 1, ["threshold is 1.5", "(-1, 1]"]),
        ([], swm(threshold=-1), 1, ["threshold is -1", "(-1, 1]"]),
        ([], swm(remove_layers=6), 1, ["remove_layers is 6, the model has 6 layers", "1 to 4 layers"]),
        ([], swm(remove_layers=0), 1, ["remove_layers is 0", "at least 1"]),
        ([], swm(ratio=0.001), 1, ["ratio 0.001 means 0 of 6 layers"]),
        ([], swm(ratio=20), 1, ["ratio is 20", "(0, 1)"]),
        ([], swm(threshold=0.5, remove_layers=2), 1, ["threshold=0.5 and remove_layers=2", "exactly one of"]),
        ([], swm(), 1, ["none of threshold, remove_layers and ratio", "exactly one of"]),
        ([], swm(treshold=0.5), 2, ["treshold"]),
        ([], swm(remove_layers=1, consolidation="magic"), 2, ["magic", "keep_top"]),
        ([], swm(plan_path="none.json"), 1, ["There is no plan at none.json"]),
        ([], [{"class_path": "callbacks.Efficiency", "init_args": {"repeats": 1}}], 1, ["repeats 1", "2 or more"]),
        ([], [{"class_path": "callbacks.NoSuchMethod"}], 2, ["NoSuchMethod"]),
        (["--model.learning_rte", "1"], None, 2, ["learning_rte"]),
        (["--model.lora.r", "0"], None, 1, ["lora.r is 0"]),
        (["--trainer.default_root_dir", "{file}/run"], None, 1, ["Cannot write to", "Give a directory"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, list) else None,
)
def test_bad_input_is_told_in_one_message(arguments, inputs, tmp_path, capsys, changes, callbacks, status, messages):
    args = arguments(*(c.format(file=inputs / "alpaca.json") for c in changes), callbacks=callbacks)
    code, error = failure(capsys, ["fit", *args])
    assert code == status
    for message in messages:
        assert message in error
    # Nothing half-written: no export, no plan, no results.
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("plan*.json"))


def test_lora_on_modules_the_model_lacks(arguments, tmp_path, capsys):
    code, error = failure(capsys, ["fit", *arguments("--model.lora.target_modules", "[qq_proj]")])
    assert code == 1
    assert "['qq_proj'], which the model does not have. Its projections are ['down_proj', 'gate_proj'" in error
    assert (tmp_path / "run" / "plan.json").is_file()  # the search was done; its plan is whole and can be used again
    assert not (tmp_path / "run" / "export").exists()


def test_empty_calibration_text(arguments, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    code, error = failure(capsys, ["prune", *arguments("--data.calibration.source", str(tmp_path / "empty.txt"))])
    assert code == 1
    assert "empty.txt" in error


def test_non_empty_output_directory_needs_overwrite(arguments, tmp_path, capsys):
    export = tmp_path / "run" / "export"
    export.mkdir(parents=True)
    (export / "mine.txt").write_text("precious")
    code, error = failure(capsys, ["prune", *arguments()])
    assert (code, (export / "mine.txt").read_text()) == (1, "precious")
    assert f"{export} exists and is not empty" in error
    assert "--overwrite" in error
    assert not (tmp_path / "run" / "plan.json").exists()  # told before the search
    # What is no export is not replaced at all.
    code, error = failure(capsys, ["prune", *arguments("--overwrite")])
    assert (code, (export / "mine.txt").read_text()) == (1, "precious")
    assert "not an earlier export" in error
    (export / "config.json").write_text("{}")
    main(["prune", *arguments("--overwrite")])
    assert json.loads((export / "config.json").read_text())["num_hidden_layers"] == 4
    assert not (export / "mine.txt").exists()


def test_results_are_not_replaced_without_overwrite(arguments, tmp_path, capsys):
    results = tmp_path / "run" / "results.json"
    results.parent.mkdir()
    results.write_text("earlier")
    code, error = failure(capsys, ["test", *arguments(callbacks=[])])
    assert (code, results.read_text()) == (1, "earlier")
    assert "holds the results of an earlier test" in error


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_export_directory_must_not_hold_the_run(arguments, tmp_path, capsys, inside):
    export = tmp_path / "run"
    callbacks = [
        {"class_path": "callbacks.SlidingWindowMerging", "init_args": {"remove_layers": 2}},
        {"class_path": "callbacks.ExportCheckpoint", "init_args": {"output_dir": str(export)}},
    ]
    if inside:
        checkpoint = {"dirpath": str(export / inside)}
        callbacks.append({"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint})
    root = ("--trainer.default_root_dir", str(tmp_path / "elsewhere")) if inside else ()
    code, error = failure(
        capsys, ["fit", *arguments("--trainer.enable_checkpointing", "true", *root, callbacks=callbacks)]
    )
    assert code == 1
    assert f"holds {export / inside}" in error
    assert not list(tmp_path.rglob("plan.json"))  # told before the search


def test_missing_checkpoint_and_endless_training_are_told(arguments, capsys):
    code, error = failure(capsys, ["fit", *arguments("--ckpt_path", "none.ckpt")])
    assert (code, "There is no checkpoint none.ckpt" in error) == (1, True)
    code, error = failure(capsys, ["fit", *arguments("--trainer.max_steps", "-1", "--trainer.max_epochs", "-1")])
    assert (code, "this one has no end" in error) == (1, True)


def test_unsupported_architecture(arguments, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=512)).save_pretrained(tmp_path / "gpt2")
    pico_tokenizer().save_pretrained(tmp_path / "gpt2")
    code, error = failure(capsys, ["prune", *arguments("--model.pretrained", str(tmp_path / "gpt2"))])
    assert code == 1
    assert "model_type 'gpt2'; supported are bloom, gemma2" in error


def test_config_of_another_version_and_other_bad_configs(arguments, tmp_path, capsys):
    code, error = failure(capsys, ["fit", *arguments(config_version=7, something_new=1)])
    assert code == 1
    assert "config_version 7; this slm_pl reads 1" in error
    code, error = failure(capsys, ["fit", "--config", str(tmp_path / "none.yaml")])
    assert code == 1
    assert "There is no config file" in error
    (tmp_path / "broken.yaml").write_text("a: [1, 2")
    code, error = failure(capsys, ["fit", "--config", str(tmp_path / "broken.yaml")])
    assert code == 1
    assert "is no YAML that can be read" in error


@pytest.mark.parametrize("command", ["fit", "prune", "estimate", "sweep"])
def test_a_config_makes_no_objects_but_those_of_its_options(command, tmp_path, capsys):
    made = tmp_path / "made"
    callback = "class_path: subprocess.Popen\n      init_args: {{args: [mkdir, {0}]}}"
    a_class = "{{class_path: subprocess.Popen, init_args: {{args: [mkdir, {0}]}}}}"
    texts = {
        "a tag": "model: !!python/object/apply:os.mkdir [{0}]\n",
        "a tag inside": "model: {{pretrained: !!python/object/new:os.mkdir [{0}]}}\n",
        "a class": f"data: {a_class}\n",
        "a callback": f"trainer:\n  callbacks:\n    - {callback}\nmeasure:\n    - {callback}\n",
        "a method": f"ratios: [0.2]\nmethods: {{{{a: {a_class}}}}}\n",
    }
    for number, text in enumerate(texts.values()):
        config = tmp_path / f"{number}.yaml"
        config.write_text(text.format(made))
        with pytest.raises(SystemExit) as ended:
            main([command, "--config", str(config)])
        assert ended.value.code
        told = capsys.readouterr().err
        assert "Traceback" not in told
        assert "error: " in told
        assert not made.exists(), text


def test_hub_model_that_cannot_be_reached(arguments, capsys, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, error = failure(capsys, ["test", *arguments("--model.pretrained", "no-one/no-such-model", callbacks=[])])
    assert code == 1
    assert "'no-one/no-such-model' could not be fetched from the Hub" in error


def test_main_help_starts_as_fast_as_its_libraries():
    """Imports, not seconds: what `--help` loads beyond torch and lightning."""
    code = (
        "import sys, torch, lightning; before = set(sys.modules)\n"
        "from slm_pl.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'transformers', 'peft', 'lm_eval', 'matplotlib', 'deepspeed', 'datasets', 'gguf', 'rich'}\n"
        "print('NEW', sorted({m.split('.')[0] for m in set(sys.modules) - before} & heavy))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "prune" in out
    assert "NEW []" in out


def test_validate_reports_the_loss_on_the_responses(arguments, capsys):
    main(["validate", *arguments()])
    line = next(line for line in capsys.readouterr().out.splitlines() if "val/loss" in line)
    assert 0 < float(line.replace("│", " ").split()[-1]) < 50


def run_in_a_process(args: list[str]) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[1]
    return subprocess.Popen(
        [sys.executable, str(root / "main.py"), *args],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("place", ["weak reference", "destructor", "open"])
def test_interrupt_counts_wherever_it_comes(place):
    """Python itself forgets an interrupt that comes in the callback of a weak reference or in __del__."""

    class Freed:
        def __del__(self):
            if place == "destructor":
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        freed = Freed()
        known = weakref.WeakSet([freed])
        if place == "weak reference":
            # The set's own callback discards from a set; this one is interrupted there.
            class Data(set):
                def discard(self, item):
                    signal.raise_signal(signal.SIGINT)
                    super().discard(item)

            known.data = Data(known.data)
        del freed
        if place == "open":
            signal.raise_signal(signal.SIGINT)
        time.sleep(5)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interruptible():
        work()
    assert time.monotonic() - start < 4
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_leaves_whole_checkpoints_and_no_export(arguments, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    callbacks = [
        {"class_path": "callbacks.SlidingWindowMerging", "init_args": {"remove_layers": 2}},
        {"class_path": "callbacks.ExportCheckpoint", "init_args": {"output_dir": str(tmp_path / "run" / "export")}},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(checkpoints), "every_n_train_steps": 1, "save_top_k": -1, "save_last": True},
        },
    ]
    changes = ("--trainer.max_steps", "100000", "--trainer.max_epochs", "-1", "--trainer.enable_checkpointing", "true")
    process = run_in_a_process(["fit", *arguments(*changes, callbacks=callbacks)])
    deadline = time.monotonic() + 120
    try:
        while len(list(checkpoints.glob("*.ckpt"))) < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode != 0
    assert "Traceback" not in out
    files = list(checkpoints.glob("*.ckpt"))
    assert len(files) >= 3, out
    for file in files:
        state = torch.load(file, weights_only=True)
        assert state["state_dict"]
        assert all("lora_" in name for name in state["state_dict"])
    assert not (tmp_path / "run" / "export").exists()
    assert not list((tmp_path / "run").glob(".*"))


def test_two_processes_end_with_one_plan_and_one_export(arguments, inputs, tmp_path):
    changes = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--overwrite")
    process = run_in_a_process(["fit", *arguments(*changes)])
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out
    shared_plan = (tmp_path / "run" / "plan.json").read_text()
    main(["prune", *arguments("--overwrite")])
    assert (tmp_path / "run" / "plan.json").read_text() == shared_plan
    exported = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert exported["num_hidden_layers"] == 4
