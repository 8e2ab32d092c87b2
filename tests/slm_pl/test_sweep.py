"""Sweeps: what there is to do, what is left of it, what fails, and the table."""

import contextlib
import csv
import importlib
import importlib.metadata
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

import callbacks
from slm_pl import identity
from slm_pl.cli import main
from slm_pl.commands import sweep_parser
from slm_pl.errors import UsageError
from slm_pl.lock import locked
from slm_pl.report.rows import Cell as Figure
from slm_pl.report.rows import Row
from slm_pl.results import Environment, ModelIdentity, Results
from slm_pl.sweep import board, engines, work
from slm_pl.sweep.cells import Cell, plan_cells
from slm_pl.sweep.config import Jobs, Recovery, SweepConfig
from slm_pl.sweep.engines import CellJob
from slm_pl.sweep.record import Record, is_finished, prepare, steps_to_do
from slm_pl.sweep.run import sweep
from slm_pl.sweep.summary import summarise, write_summary
from slm_pl.sweep.work import ProcessRunner, do_cell
from slm_pl.trainer_cli import check_run

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(ROOT.glob("configs/sweeps/*.yaml"))
HOOK = {"class_path": "callbacks.Perplexity"}


def settings(directory: Path | str = "runs/x", **changes: object) -> SweepConfig:
    options = {
        "output_dir": str(directory),
        "model": {"pretrained": "some/model", "revision": "abc", "dtype": "float32"},
        "data": {"path": "embedded", "calibration": {"source": "embedded", "samples": 3, "seed": 5}},
        "trainer": {"accelerator": "cpu", "logger": False},
        "methods": {"flap": {"class_path": "callbacks.FLAP"}, "sleb": {"class_path": "callbacks.SLEB"}},
        "ratios": [0.2, 0.125],
        "measure": [HOOK],
        **changes,
    }
    return SweepConfig(**options)  # type: ignore[arg-type]


def one(directory: Path | str = "runs/x", **changes: object) -> Cell:
    """The first cell that is not the dense one."""
    return next(cell for cell in plan_cells(settings(directory, **changes)) if cell.method is not None)


def save_results(path: Path, label: str, compressed: bool, parameters: int) -> None:
    environment = Environment({"torch": "2"}, "cpu", "a processor", 1, "float32", "2026-01-01", None, "linux")
    identity = ModelIdentity(label, "x", "some/model", 6, parameters, "0" * 64 if compressed else None)
    Results(identity, environment).save(path)


class Machine:
    """Stands in for the processes: leaves what they would, and fails where it is told to."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.commands: list[tuple[str, ...]] = []

    def __call__(self, arguments: list[str], log: Path) -> int:
        command, _, path, *options = arguments
        directory = Path(path).parent
        self.commands.append((command, directory.name))
        assert "--overwrite" in options
        assert (options[1:] == ["--ckpt_path", "last"]) == (command == "fit")
        with log.open("a") as out:
            out.write(f"working on {directory.name}\n")
            if f"{command} {directory.name}" in self.failing:
                out.write("error: it cannot be done\n")
                return 3
        config = yaml.safe_load(Path(path).read_text())
        if command == "test":
            parameters = 1000 - config["seed_everything"]
            save_results(directory / "results.json", config["model"]["label"], directory.name != "dense", parameters)
        else:
            (directory / "export").mkdir(exist_ok=True)
            (directory / "export" / "config.json").write_text("{}")
            (directory / "checkpoints").mkdir(exist_ok=True)
            (directory / "checkpoints" / "last.ckpt").write_text("weights")
        return 0


# What there is to do


def test_cells_are_the_dense_model_and_methods_by_ratios_by_seeds():
    cells = plan_cells(settings(seeds=[1, 7]))
    assert [cell.name for cell in cells] == [
        "dense",
        *(f"{method}_{ratio}_s{seed}" for method in ("flap", "sleb") for ratio in (0.2, 0.125) for seed in (1, 7)),
    ]
    assert [cell.label for cell in cells[:4]] == [
        "dense",
        "flap 20 %, seed 1",
        "flap 20 %, seed 7",
        "flap 12.5 %, seed 1",
    ]
    assert one().label == "flap 20 %"
    assert one(recovery=Recovery()).label == "flap 20 %, recovered"
    assert [cell.name for cell in plan_cells(settings(dense=False, ratios=[0.2]))] == [
        "flap_0.2_s1234",
        "sleb_0.2_s1234",
    ]
    assert len({cell.hash for cell in cells}) == len(cells)


def test_a_cell_compresses_exports_and_measures_its_export():
    cell = one(seeds=[7])
    compress, measure = cell.steps
    assert (compress.command, measure.command) == ("prune", "test")
    assert compress.config["seed_everything"] == measure.config["seed_everything"] == 7
    assert compress.config["data"] == {
        "class_path": "slm_pl.data.AlpacaDataModule",
        "init_args": {"path": "embedded", "calibration": {"source": "embedded", "samples": 3, "seed": 7}},
    }
    assert compress.config["trainer"]["callbacks"] == [
        {"class_path": "callbacks.FLAP", "init_args": {"ratio": 0.2}},
        {"class_path": "callbacks.ExportCheckpoint", "init_args": {"output_dir": "runs/x/flap_0.2_s7/export"}},
    ]
    assert compress.config["trainer"]["default_root_dir"] == "runs/x/flap_0.2_s7"
    assert compress.config["trainer"]["accelerator"] == "cpu"
    assert compress.config["model"] == {"pretrained": "some/model", "revision": "abc", "dtype": "float32"}
    assert measure.config["model"] == {
        "pretrained": "runs/x/flap_0.2_s7/export",
        "dtype": "float32",
        "label": "flap 20 %",
    }
    assert measure.config["trainer"]["callbacks"] == [HOOK]
    (dense,) = plan_cells(settings())[0].steps
    assert (dense.command, dense.config["model"]["pretrained"]) == ("test", "some/model")


def test_a_sequence_shares_what_is_left_of_the_ratio():
    def shares(ratio: float, *own: dict) -> list[float]:
        sequence = [{"class_path": "callbacks.FLAP", "init_args": arguments} for arguments in own]
        cell = one(methods={"x": sequence}, ratios=[ratio])
        return [callback["init_args"]["ratio"] for callback in cell.steps[0].config["trainer"]["callbacks"][:-1]]

    first, second = shares(0.2, {}, {})
    assert first == second
    assert (1 - first) * (1 - second) == pytest.approx(0.8, abs=1e-5)
    first, second = shares(0.2, {"ratio": 0.1}, {})
    assert first == 0.1
    assert 0.9 * (1 - second) == pytest.approx(0.8, abs=1e-5)
    with pytest.raises(UsageError, match="no less"):
        shares(0.1, {"ratio": 0.1}, {})
    with pytest.raises(UsageError, match="ratio of its own"):
        shares(0.3, {"ratio": 0.1})
    with pytest.raises(UsageError, match="remove_layers"):
        shares(0.2, {"remove_layers": 3}, {})
    with pytest.raises(UsageError, match="'much'"):
        shares(0.2, {"ratio": "much"}, {})


def test_a_method_that_draws_gets_the_seed():
    drawn = {"class_path": "callbacks.LayerRemoval", "init_args": {"order": "random", "seed": "{seed}"}}
    cells = plan_cells(settings(methods={"random": drawn}, seeds=[3, 4], ratios=[0.2], dense=False))
    assert [cell.steps[0].config["trainer"]["callbacks"][0]["init_args"]["seed"] for cell in cells] == [3, 4]


def test_recovery_trains_on_top_of_the_sections_of_the_sweep():
    recovery = Recovery(
        model={"learning_rate": 0.5},
        data={"cutoff": 64},
        trainer={"max_epochs": 2, "accelerator": "gpu"},
        callbacks=[{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}],
    )
    compress, measure = one(recovery=recovery).steps
    assert compress.command == "fit"
    assert compress.config["model"]["learning_rate"] == 0.5
    assert compress.config["model"]["revision"] == "abc"
    data = compress.config["data"]["init_args"]
    assert (data["path"], data["cutoff"], data["calibration"]["samples"]) == ("embedded", 64, 3)
    assert (compress.config["trainer"]["max_epochs"], compress.config["trainer"]["accelerator"]) == (2, "gpu")
    names = [callback["class_path"].rpartition(".")[2] for callback in compress.config["trainer"]["callbacks"]]
    assert names == ["FLAP", "ExportCheckpoint", "ModelCheckpoint"]
    # What is measured, and on what, is as without recovery.
    assert measure.config["trainer"]["accelerator"] == "cpu"
    assert "learning_rate" not in measure.config["model"]
    other = Recovery(data={"class_path": "slm_pl.data.TextDataModule", "init_args": {"source": "embedded"}})
    data = one(recovery=other).steps[0].config["data"]
    assert data["class_path"] == "slm_pl.data.TextDataModule"
    assert data["init_args"] == {
        "source": "embedded",
        "calibration": {"source": "embedded", "samples": 3, "seed": 1234},
    }


def test_hash_is_of_what_decides_the_result(monkeypatch):
    cell = one()
    assert one("elsewhere/y").hash == cell.hash
    assert one(seeds=[1234, 7]).hash == cell.hash  # only its label is another
    assert one(methods={"renamed": {"class_path": "callbacks.FLAP"}}).hash == cell.hash
    changed = [
        one(seeds=[7]),
        one(ratios=[0.3]),
        one(methods={"flap": {"class_path": "callbacks.FLAP", "init_args": {"metric": "IFV"}}}),
        one(recovery=Recovery()),
        one(model={"pretrained": "another/model"}),
        one(trainer={"accelerator": "cpu", "precision": "bf16-true"}),
    ]
    assert len({cell.hash, *(other.hash for other in changed)}) == len(changed) + 1
    assert cell.steps[0].hash not in {other.steps[0].hash for other in changed}
    measured = one(measure=[HOOK, {"class_path": "callbacks.Efficiency"}])
    assert measured.hash != cell.hash
    assert measured.steps[0].hash == cell.steps[0].hash  # the export stays what it was
    with monkeypatch.context() as patch:
        patch.setattr("slm_pl.__version__", "999")
        assert one().hash != cell.hash
    with monkeypatch.context() as patch:
        patch.setattr(identity, "sources", lambda: "0" * 64)
        assert one().hash != cell.hash
    for package in ("torch", "transformers", "lm_eval", "peft"):
        version = importlib.metadata.version
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", lambda n, p=package, v=version: "999" if n == p else v(n))
            assert one().hash != cell.hash, package
    assert one().hash == cell.hash


def test_hash_is_of_the_programs_own_sources(tmp_path):
    package = tmp_path / "package"
    (package / "deep").mkdir(parents=True)
    (package / "a.py").write_text("x = 1\n")
    (package / "deep" / "b.py").write_text("y = 1\n")
    before = identity.sources_of([package])
    (package / "notes.txt").write_text("no code")
    assert identity.sources_of([package]) == before
    (package / "deep" / "b.py").write_text("y = 2\n")
    changed = identity.sources_of([package])
    (package / "deep" / "b.py").rename(package / "b.py")
    assert len({before, changed, identity.sources_of([package])}) == 3
    assert identity.sources() == identity.sources_of([ROOT / "slm_pl", ROOT / "callbacks"])


def test_hash_is_of_the_files_that_the_config_names(tmp_path, monkeypatch):
    model, text, tasks, rows = (tmp_path / name for name in ("model", "text.txt", "tasks", "rows.json"))
    for path in (
        model / "weights",
        model / "README.md",
        model / "cache" / "x",
        text,
        tasks / "boolq" / "test.jsonl",
        rows,
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("as it was")

    def cells() -> tuple[Cell, Cell]:
        dense, cell, *_ = plan_cells(
            settings(
                model={"pretrained": str(model)},
                data={"path": str(rows), "calibration": {"source": str(text)}},
                measure=[{"class_path": "callbacks.ZeroShot", "init_args": {"local_data": str(tasks)}}],
            )
        )
        return dense, cell

    def changes(path: Path) -> list[str]:
        """Which of the steps are others after another text of the same size."""
        before = [step.hash for cell in cells() for step in cell.steps]
        path.write_text("as it is.")
        after = [step for cell in cells() for step in cell.steps]
        return [step.command for step, old in zip(after, before, strict=True) if step.hash != old]

    assert changes(model / "weights") == ["test", "prune", "test"]
    assert changes(text) == ["prune", "test"]  # the dense model's figures are of no calibration text
    assert changes(rows) == ["test", "prune", "test"]
    assert changes(tasks / "boolq" / "test.jsonl") == ["test", "test"]
    assert changes(model / "cache" / "x") == []
    assert changes(model / "README.md") == []  # which gets the figures once there are any
    # Big files are known by size and time: the content is not read.
    monkeypatch.setattr(identity, "_BIG", 1)
    hashes = [cell.hash for cell in cells()]
    old = (model / "weights").stat()
    (model / "weights").write_text("it is not")
    os.utime(model / "weights", ns=(old.st_atime_ns, old.st_mtime_ns))
    assert [cell.hash for cell in cells()] == hashes
    os.utime(model / "weights", ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    assert all(new.hash != old for new, old in zip(cells(), hashes, strict=True))


def test_dense_cell_is_the_same_with_other_seeds_and_calibration():
    def dense(**changes: object) -> Cell:
        return plan_cells(settings(**changes))[0]

    data = settings().data
    text = {"path": "embedded", "calibration": {"source": "embedded", "samples": 9}}
    assert {dense(seeds=[7]).hash, dense(seeds=[7, 1234]).hash, dense(data=text).hash} == {dense().hash}
    assert dense(data={**data, "path": "another"}).hash != dense().hash
    # What it is run with has both.
    (step,) = dense(seeds=[7]).steps
    assert step.config["seed_everything"] == step.config["data"]["init_args"]["calibration"]["seed"] == 7
    assert one(seeds=[7]).hash != one().hash != one(data=text).hash


# The configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": []}, "ratios is []"),
        ({"ratios": [0.2, 0.2]}, "ratios is [0.2, 0.2]"),
        ({"ratios": [20]}, "ratios holds 20"),
        ({"seeds": [1, 1]}, "seeds is [1, 1]"),
        ({"measure": []}, "measure is empty"),
        ({"methods": {"dense": {"class_path": "callbacks.FLAP"}}}, "'dense'"),
        ({"methods": {"a/b": {"class_path": "callbacks.FLAP"}}}, "'a/b'"),
        ({"methods": {"flap": []}}, "methods.flap is an empty list"),
        ({"methods": {"flap": {"ratio": 0.2}}}, "methods.flap has no class_path"),
        ({"trainer": {"callbacks": []}}, "trainer has callbacks"),
    ],
)
def test_what_cannot_be_swept_is_told(changes, message):
    with pytest.raises(UsageError) as caught:
        settings(**changes)
    assert message in str(caught.value)


def test_what_cells_would_share_or_start_twice_is_told():
    with pytest.raises(UsageError, match="default_root_dir"):
        Recovery(trainer={"default_root_dir": "x"})
    with pytest.raises(UsageError, match="dirpath"):
        Recovery(callbacks=[{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "x"}}])
    with pytest.raises(UsageError, match="tasks_per_node is 8"):
        Jobs(parameters={"tasks_per_node": 8})
    with pytest.raises(UsageError, match="at_once is 0"):
        Jobs(at_once=0)


def parse(*words: str) -> SweepConfig:
    options = sweep_parser().parse_args(words).as_dict()
    return SweepConfig.from_dict({k: v for k, v in options.items() if k not in ("config", "overwrite", "dry_run")})


def test_values_on_the_command_line_count(capsys):
    path = str(ROOT / "configs/sweeps/quickstart.yaml")
    shipped = parse("--config", path)
    assert list(shipped.methods) == ["slm", "sleb", "block_influence", "flap", "wanda_structured", "llm_pruner_uniform"]
    assert (shipped.ratios, len(plan_cells(shipped))) == ([0.1, 0.2], 13)
    changed = parse(
        "--config", path, "--ratios", "[0.3]", "--methods", "{x: {class_path: callbacks.FLAP}}",
        "--model.pretrained", "a/b", "--submitit.at_once", "3", "--output_dir", "y",
    )  # fmt: skip
    assert (changed.ratios, changed.methods) == ([0.3], {"x": {"class_path": "callbacks.FLAP"}})
    assert changed.model == {**shipped.model, "pretrained": "a/b"}
    assert (changed.submitit.at_once, changed.output_dir, changed.data) == (3, "y", shipped.data)
    with pytest.raises(SystemExit) as done:
        main(["sweep", "--config", path, "--ratoi", "3"])
    assert (done.value.code, "--ratoi" in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("config_version: 9\n", 1, "config_version 9"),
        ("colour: red\n", 2, "colour"),
        ("recovery: {modl: {lora: null}}\n", 2, "modl"),
        ("methods: {x: {class_path: callbacks.FLAP, init_args: {metrik: WIFV}}}\n", 1, "metrik"),
        ("measure: [{class_path: callbacks.NoSuchHook}]\n", 1, "NoSuchHook"),
        ("trainer: {acelerator: cpu}\n", 1, "acelerator"),
        ("model: none.yaml\n", 1, "none.yaml"),
    ],
)
def test_bad_sweeps_are_told_before_anything_runs(text, status, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = {
        "config_version": 1,
        "output_dir": "out",
        "model": {"pretrained": "a/b"},
        "methods": {"flap": {"class_path": "callbacks.FLAP"}},
        "ratios": [0.2],
        "measure": [HOOK],
    }
    Path("s.yaml").write_text(yaml.safe_dump({**good, **yaml.safe_load(text)}))
    with pytest.raises(SystemExit) as done:
        main(["sweep", "--config", "s.yaml"])
    error = capsys.readouterr().err
    assert done.value.code == status
    assert message in error
    assert "Traceback" not in error
    assert not Path("out").exists()


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_sweep_makes_configs_that_the_command_line_takes(path, tmp_path):
    config = parse("--config", str(path))
    assert config.config_version == yaml.safe_load(path.read_text())["config_version"]  # written down
    cells = plan_cells(config)
    assert len(cells) == 1 + len(config.methods) * len(config.ratios) * len(config.seeds)
    measured = 0
    for cell in cells:
        if cell.ratio not in (None, config.ratios[0]):
            continue
        for step in cell.steps:
            made = tmp_path / f"{cell.name}_{step.name}.yaml"
            work.write_config(made, step)
            measured += step.name == "measure"
            if step.name == "compress" or measured == 1:  # the others measure the same
                check_run(step.command, str(made))
            assert yaml.safe_load(made.read_text()) == step.config
            for callback in step.config["trainer"]["callbacks"]:
                module, _, name = callback["class_path"].rpartition(".")
                method = getattr(importlib.import_module(module), name)
                if issubclass(method, callbacks.CompressionCallback):
                    method(**callback["init_args"])


def test_llama_sweep_recovers_as_published():
    config = parse("--config", str(ROOT / "configs/sweeps/llama2_7b.yaml"))
    assert (config.ratios, config.engine, config.submitit.cluster) == ([0.2, 0.35], "submitit", "slurm")
    recipe = yaml.safe_load((ROOT / "configs/parts/recipe_lora_alpaca.yaml").read_text())
    fit = next(cell for cell in plan_cells(config) if cell.method).steps[0].config
    assert fit["model"]["lora"] == recipe["model"]["lora"]
    assert recipe["data"].items() <= fit["data"]["init_args"].items()
    assert recipe["trainer"].items() <= fit["trainer"].items()
    assert len([c for c in fit["trainer"]["callbacks"] if c["class_path"].endswith("ModelCheckpoint")]) == 2


# What is left to do


def test_second_sweep_does_nothing_and_a_changed_one_what_has_changed(tmp_path, capsys):
    first = Machine()
    assert sweep(settings(tmp_path), run=first) == 0
    names = [f"{method}_{ratio}_s1234" for method in ("flap", "sleb") for ratio in (0.2, 0.125)]
    assert first.commands == [("test", "dense"), *((c, name) for name in names for c in ("prune", "test"))]
    record = json.loads((tmp_path / "flap_0.2_s1234" / "cell.json").read_text())
    assert (record["status"], record["error"]) == ("finished", None)
    assert record["hash"] == one().hash
    assert set(record["steps"]) == {"compress", "measure"}
    table = json.loads((tmp_path / "comparison.json").read_text())
    assert [model["label"] for model in table["models"]][:2] == ["dense", "flap 20 %"]

    again = Machine()
    assert sweep(settings(tmp_path), run=again) == 0
    assert again.commands == []
    # Other hooks: the exports are measured as they are.
    measured = Machine()
    changes = {"measure": [HOOK, {"class_path": "callbacks.Efficiency"}]}
    assert sweep(settings(tmp_path, **changes), overwrite=True, run=measured) == 0
    assert measured.commands == [("test", "dense"), *(("test", name) for name in names)]
    # Another seed: that one only, and the labels say which is which.
    seeded = Machine()
    more = settings(tmp_path, **changes, seeds=[1234, 7], ratios=[0.2])
    assert sweep(more, run=seeded) == 0
    assert seeded.commands == [(c, f"{m}_0.2_s7") for m in ("flap", "sleb") for c in ("prune", "test")]
    labels = [
        json.loads((tmp_path / f"flap_0.2_s{s}" / "results.json").read_text())["model"]["label"] for s in (1234, 7)
    ]
    assert labels == ["flap 20 %, seed 1234", "flap 20 %, seed 7"]
    # Another method under the old name: both steps. And all, where that is asked for.
    other = Machine()
    flap = {"flap": {"class_path": "callbacks.FLAP", "init_args": {"metric": "IFV"}}}
    assert sweep(settings(tmp_path, **changes, methods=flap, ratios=[0.2], dense=False), overwrite=True, run=other) == 0
    assert other.commands == [("prune", names[0]), ("test", names[0])]
    everything = Machine()
    sweep(settings(tmp_path, **changes, methods=flap, ratios=[0.2]), overwrite=True, run=everything)
    assert everything.commands == [("test", "dense"), ("prune", names[0]), ("test", names[0])]


def test_results_that_cannot_be_read_are_measured_again(tmp_path):
    sweep(settings(tmp_path, ratios=[0.2]), run=Machine())
    (tmp_path / "flap_0.2_s1234" / "results.json").write_text("{")
    (tmp_path / "sleb_0.2_s1234" / "cell.json").write_text("{")
    again = Machine()
    sweep(settings(tmp_path, ratios=[0.2]), run=again)
    assert again.commands == [("test", "flap_0.2_s1234"), ("prune", "sleb_0.2_s1234"), ("test", "sleb_0.2_s1234")]


def test_dry_run_prints_what_is_left_and_touches_nothing(tmp_path, capsys):
    sweep(settings(tmp_path, ratios=[0.2], methods={"flap": {"class_path": "callbacks.FLAP"}}), run=Machine())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    none = Machine()
    assert sweep(settings(tmp_path), dry_run=True, run=none) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if "flap_0.2_s1234" in line).count("nothing: it is finished") == 1
    assert next(line for line in lines if "sleb_0.2_s1234" in line).count("prune, test") == 1
    assert none.commands == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_weights_go_where_they_are_not_wanted(tmp_path):
    changes = {"ratios": [0.2], "keep_exports": False}
    sweep(settings(tmp_path, **changes), run=Machine())
    assert (tmp_path / "flap_0.2_s1234" / "results.json").is_file()
    assert not (tmp_path / "flap_0.2_s1234" / "export").exists()
    assert not (tmp_path / "flap_0.2_s1234" / "checkpoints").exists()
    again = Machine()
    sweep(settings(tmp_path, **changes), run=again)
    assert again.commands == []


def test_fit_goes_on_with_its_own_checkpoints_only(tmp_path):
    found = []

    def fit(arguments: list[str], log: Path) -> int:
        """Fails behind its first checkpoint."""
        path = Path(arguments[2]).parent / "checkpoints" / "last.ckpt"
        found.append(path.exists())
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        return 1

    cell = one(tmp_path, recovery=Recovery())
    other = one(tmp_path, recovery=Recovery(), model={"pretrained": "another/model"})
    for which, overwrite in ((cell, False), (cell, False), (other, False), (other, False), (other, True)):
        prepare(which, overwrite)
        assert do_cell(which, fit).status == "failed"
    assert found == [False, True, False, True, False]


def test_finished_cells_of_other_settings_are_not_replaced_unasked(tmp_path, monkeypatch, capsys):
    flap = {"flap": {"class_path": "callbacks.FLAP"}}
    base = {"ratios": [0.2], "methods": flap}
    sweep(settings(tmp_path, **base), run=Machine())
    stored = json.loads((tmp_path / "flap_0.2_s1234" / "cell.json").read_text())["steps"]["compress"]["parts"]
    assert set(stored) == {"program", "versions", "config", "files"}
    assert f"torch {importlib.metadata.version('torch')}" in stored["versions"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refusal(**changes: object) -> str:
        with pytest.raises(UsageError) as caught:
            sweep(settings(tmp_path, **{**base, **changes}), run=Machine())
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert "Pass --overwrite to replace them, or give another output_dir." in str(caught.value)
        return str(caught.value)

    hooks = {"measure": [HOOK, {"class_path": "callbacks.Efficiency"}]}
    assert "replace: dense, flap_0.2_s1234 made with another config. Pass" in refusal(**hooks)
    other = {"flap": {"class_path": "callbacks.FLAP", "init_args": {"metric": "IFV"}}}
    # The dense cell is the same, and a cell that is not there is no obstacle.
    assert "replace: flap_0.2_s1234 made with another config. Pass" in refusal(methods=other, seeds=[1234, 8])
    with monkeypatch.context() as patch:
        patch.setattr(identity, "sources", lambda: "0" * 64)
        assert "dense, flap_0.2_s1234 made with another program (the code of slm_pl or" in refusal()
    with monkeypatch.context() as patch:
        real = importlib.metadata.version
        patch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "torch" else real(name))
        told = refusal(**hooks)
        assert f"other versions (torch {real('torch')} -> 9.9) and another config" in told
    # A dry run says it too.
    assert sweep(settings(tmp_path, **base, **hooks), dry_run=True, run=Machine()) == 0
    assert capsys.readouterr().out.count("refused without --overwrite: finished with another config") == 2
    # Recovered cells have places of their own, and what is asked for again is there.
    both = Machine()
    assert sweep(settings(tmp_path, **base, recovery=Recovery()), run=both) == 0
    assert both.commands == [("fit", "flap_0.2_s1234_recovered"), ("test", "flap_0.2_s1234_recovered")]
    # A record without parts is of an earlier program.
    path = tmp_path / "flap_0.2_s1234" / "cell.json"
    record = json.loads(path.read_text())
    steps = {name: {k: v for k, v in step.items() if k != "parts"} for name, step in record["steps"].items()}
    path.write_text(json.dumps({**record, "hash": "old", "steps": steps}))
    with pytest.raises(UsageError, match="flap_0.2_s1234 made with an earlier version of this program"):
        sweep(settings(tmp_path, **base), run=Machine())


def test_edited_calibration_text_is_told(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one")
    config = settings(tmp_path / "out", ratios=[0.2], data={"calibration": {"source": str(text)}})
    sweep(config, run=Machine())
    text.write_text("two")
    with pytest.raises(UsageError, match="flap_0.2_s1234, sleb_0.2_s1234 made with other files under the names"):
        sweep(config, run=Machine())


def test_interrupted_overwrite_goes_on_without_it(tmp_path):
    base = {"ratios": [0.2, 0.3], "dense": False}
    sweep(settings(tmp_path, **base), run=Machine())
    changed = settings(tmp_path, **base, trainer={"accelerator": "cpu", "precision": "bf16-true"})
    machine = Machine()

    def interrupted(arguments: list[str], log: Path) -> int:
        if Path(arguments[2]).parent.name.startswith("sleb"):
            raise KeyboardInterrupt
        return machine(arguments, log)

    with pytest.raises(KeyboardInterrupt):
        sweep(changed, overwrite=True, run=interrupted)
    rest = Machine()
    assert sweep(changed, run=rest) == 0
    # The last was not begun when it stopped.
    assert rest.commands == [(c, f"sleb_{ratio}_s1234") for ratio in (0.2, 0.3) for c in ("prune", "test")]


def test_export_that_is_wanted_again_is_made_again(tmp_path, capsys):
    base = {"ratios": [0.2], "methods": {"flap": {"class_path": "callbacks.FLAP"}}}
    sweep(settings(tmp_path, **base, keep_exports=False), run=Machine())
    capsys.readouterr()
    assert sweep(settings(tmp_path, **base), dry_run=True, run=Machine()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "prune, test (export is gone)" in next(line for line in lines if "flap_0.2_s1234" in line)
    assert "nothing: it is finished" in next(line for line in lines if "dense" in line)
    again = Machine()
    assert sweep(settings(tmp_path, **base), run=again) == 0
    assert again.commands == [("prune", "flap_0.2_s1234"), ("test", "flap_0.2_s1234")]
    assert (tmp_path / "flap_0.2_s1234" / "export" / "config.json").is_file()


# One at a time


def test_second_sweep_in_a_directory_is_refused(tmp_path):
    lock = tmp_path / ".lock"
    base = {"ratios": [0.2], "dense": False}
    seen = []

    def looking(arguments: list[str], log: Path) -> int:
        seen.append(json.loads(lock.read_text()))
        raise RuntimeError("unforeseen")

    with pytest.raises(RuntimeError, match="unforeseen"):
        sweep(settings(tmp_path, **base), run=looking)
    assert seen == [{"host": socket.gethostname(), "pid": os.getpid()}]
    assert not lock.exists()

    with locked(tmp_path), pytest.raises(UsageError) as caught:
        sweep(settings(tmp_path, **base), run=Machine())
    assert f"Another sweep works in {tmp_path}: process {os.getpid()} on {socket.gethostname()}" in str(caught.value)
    assert f"remove {lock}" in str(caught.value)
    # Nobody needs the lock to look.
    with locked(tmp_path):
        assert sweep(settings(tmp_path, **base), dry_run=True) == 0
    lock.write_text(json.dumps({"host": "another-host", "pid": 1}))  # which was killed
    assert sweep(settings(tmp_path, **base), run=Machine()) == 0
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_lock_of_another_is_left_alone(tmp_path):
    with locked(tmp_path):
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").write_text("another's, after somebody removed ours")
    assert (tmp_path / ".lock").read_text().startswith("another's")


# What fails


def test_a_cell_that_fails_does_not_stop_the_others_and_is_tried_again(tmp_path, capsys):
    first = Machine("prune flap_0.2_s1234", "test sleb_0.2_s1234")
    config = settings(tmp_path, ratios=[0.2], methods={**settings().methods, "x": {"class_path": "callbacks.SLEB"}})
    assert sweep(config, run=first) == 2
    assert first.commands == [
        ("test", "dense"),
        ("prune", "flap_0.2_s1234"),
        *((command, name) for name in ("sleb_0.2_s1234", "x_0.2_s1234") for command in ("prune", "test")),
    ]
    record = json.loads((tmp_path / "flap_0.2_s1234" / "cell.json").read_text())
    assert record["status"] == "failed"
    assert record["error"].splitlines() == [
        "prune ended with status 3",
        "working on flap_0.2_s1234",
        "error: it cannot be done",
    ]
    out = capsys.readouterr().out
    assert "flap 20 %: failed: error: it cannot be done" in out
    assert str(tmp_path / "flap_0.2_s1234" / "log.txt") in out
    assert "run the same command again" in out
    table = json.loads((tmp_path / "comparison.json").read_text())
    assert [model["label"] for model in table["models"]] == ["dense", "x 20 %"]
    lines = json.loads((tmp_path / "sweep.json").read_text())["lines"]
    assert [(line["method"], line["seeds"], line["failed"]) for line in lines] == [
        ("dense", [1234], []),
        ("flap", [], [1234]),
        ("sleb", [], [1234]),
        ("x", [1234], []),
    ]
    again = Machine()
    assert sweep(config, run=again) == 0
    # The export of the second is there and known to be the right one.
    assert again.commands == [("prune", "flap_0.2_s1234"), ("test", "flap_0.2_s1234"), ("test", "sleb_0.2_s1234")]


def test_old_results_do_not_stand_for_a_cell_that_now_fails(tmp_path):
    sweep(settings(tmp_path, ratios=[0.2]), run=Machine())
    methods = {"flap": {"class_path": "callbacks.FLAP", "init_args": {"metric": "IFV"}}}
    failing = Machine("prune flap_0.2_s1234")
    assert sweep(settings(tmp_path, ratios=[0.2], methods=methods), overwrite=True, run=failing) == 1
    assert (tmp_path / "flap_0.2_s1234" / "results.json").is_file()
    assert [m["label"] for m in json.loads((tmp_path / "comparison.json").read_text())["models"]] == ["dense"]


def test_status_of_a_sweep_with_failures_is_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("slm_pl.sweep.run.sweep", lambda *arguments: 1)
    words = ["sweep", "--config", str(ROOT / "configs/sweeps/quickstart.yaml"), "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 1
    monkeypatch.setattr("slm_pl.sweep.run.sweep", lambda *arguments: 0)
    main(words)


def test_interrupted_sweep_keeps_what_is_finished(tmp_path, capsys, monkeypatch):
    machine = Machine()

    def interrupted(self: ProcessRunner, arguments: list[str], log: Path) -> int:
        if Path(arguments[2]).parent.name.startswith("sleb"):
            raise KeyboardInterrupt
        return machine(arguments, log)

    monkeypatch.setattr(ProcessRunner, "__call__", interrupted)
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**vars(settings(tmp_path / "out", ratios=[0.2])), "submitit": {}}))
    with pytest.raises(SystemExit) as done:
        main(["sweep", "--config", str(path)])
    assert done.value.code == 130
    cells = {cell.name: cell for cell in plan_cells(settings(tmp_path / "out", ratios=[0.2]))}
    assert is_finished(cells["flap_0.2_s1234"])
    assert Record.load(cells["sleb_0.2_s1234"]).status == "interrupted"
    assert [step.command for step in steps_to_do(cells["sleb_0.2_s1234"])] == ["prune", "test"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


STUB = """
import json, os, signal, sys, time
from pathlib import Path
"""


def program(tmp_path: Path, code: str) -> tuple[str, str]:
    path = tmp_path / "program.py"
    path.write_text(STUB + code)
    return (sys.executable, str(path))


def test_process_tells_its_status_and_output_and_knows_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.chdir(tmp_path)
    code = "print('said', sys.argv[1:], os.environ['SLURM_JOB_NAME'])\nprint('wrong', file=sys.stderr)\nsys.exit(4)"
    assert ProcessRunner(program(tmp_path, code))(["test", "--overwrite"], tmp_path / "log.txt") == 4
    assert (tmp_path / "log.txt").read_text() == "$ test --overwrite\nsaid ['test', '--overwrite'] bash\nwrong\n"
    # The package is found from any directory.
    code = "import importlib.util\nprint(importlib.util.find_spec('callbacks').origin)"
    assert ProcessRunner((*program(tmp_path, code),))([], tmp_path / "where.txt") == 0
    assert (tmp_path / "where.txt").read_text().splitlines()[1] == str(ROOT / "callbacks" / "__init__.py")
    assert (sys.executable, "-m", "slm_pl") == work.PROGRAM


@pytest.mark.parametrize("stubborn", [False, True])
def test_interrupt_ends_the_process(tmp_path, monkeypatch, stubborn):
    monkeypatch.setattr(work, "_PATIENCE_S", 1 if stubborn else 30)
    code = (
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"signal.signal(signal.SIGTERM, lambda *_: Path('ended').touch() or {stubborn} or sys.exit(1))\n"
        "Path('pid').write_text(str(os.getpid()))\nwhile True: time.sleep(0.02)"
    )
    monkeypatch.chdir(tmp_path)

    def interrupt() -> None:
        while not (tmp_path / "pid").is_file():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        ProcessRunner(program(tmp_path, code))([], tmp_path / "log.txt")
    assert (tmp_path / "ended").is_file()  # it was asked, so a fit could have written its checkpoint
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


PARENT = """
from tests.slm_pl.test_sweep import ProcessRunner
from pathlib import Path
ProcessRunner((sys.executable, sys.argv[1]))([], Path(sys.argv[2]))
"""


def test_what_a_killed_sweep_ran_ends_with_it(tmp_path):
    code = (
        "import subprocess\nfrom slm_pl.lifeline import hold_on\nhold_on()\n"
        "rank = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "Path('pids.tmp').write_text(f'{os.getpid()} {rank.pid} {os.environ.get(\"SLM_PL_LIFELINE\")}')\n"
        "os.rename('pids.tmp', 'pids')\ntime.sleep(60)\n"
    )
    _, work_program = program(tmp_path, code)
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import sys\n{PARENT}", work_program, str(tmp_path / "log.txt")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        _until((tmp_path / "pids").exists)
        process, rank, name = (tmp_path / "pids").read_text().split()
        assert name == "None"  # the ranks would take the number for their own descriptor
        assert _is_running(process)
        assert _is_running(rank)
    finally:
        parent.kill()
        parent.wait()
    _until(lambda: not _is_running(process) and not _is_running(rank))


def _until(there, seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < ends
        time.sleep(0.02)


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_signal_of_the_cluster_is_for_the_job_and_not_for_what_it_runs(tmp_path):
    code = (
        "os.kill(os.getpid(), signal.SIGUSR2)\n"
        "import subprocess\n"
        "sys.exit(subprocess.call([sys.executable, '-c', 'import os; os.kill(os.getpid(), 12); print(7)']))"
    )
    assert signal.SIGUSR2 == 12
    caught: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: caught.append(number))
    try:
        assert ProcessRunner(program(tmp_path, code))([], tmp_path / "log.txt") == 0
        os.kill(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (tmp_path / "log.txt").read_text().endswith("\n7\n")
    assert caught == [signal.SIGUSR2]  # submitit's own handler is called as ever


# Jobs


WORK = """
command, _, path = sys.argv[1:4]
cell = Path(path).parent
if cell.name.startswith("killed"):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(30)
if command == "test":
    label = next(line.split(": ", 1)[1] for line in open(path) if line.startswith("  label"))
    record = json.loads((cell.parent / "template.json").read_text())
    record["model"]["label"] = label.strip()
    del record["sha256"]
    (cell / "results.json").write_text(json.dumps(record))
else:
    (cell / "export").mkdir(exist_ok=True)
    (cell / "export" / "config.json").write_text("{}")
"""


@pytest.mark.long
def test_jobs_of_the_local_cluster(tmp_path, capsys):
    pytest.importorskip("submitit", reason="submitit is an optional dependency")
    save_results(tmp_path / "template.json", "x", True, 900)
    flap, sleb = settings().methods.values()
    config = settings(
        tmp_path,
        methods={"flap": flap, "killed": sleb},
        ratios=[0.2],
        dense=False,
        engine="submitit",
        submitit=Jobs("local", {"timeout_min": 3}),
    )
    assert sweep(config, run=ProcessRunner(program(tmp_path, WORK))) == 1
    good, killed = plan_cells(config)
    assert is_finished(good)
    record = Record.load(killed)
    assert (record.status, "job " in record.error) == ("failed", True)
    assert "FileNotFoundError" not in record.error
    assert len(list((tmp_path / "jobs").glob("*_submitted.pkl"))) == 2
    assert [m["label"] for m in json.loads((tmp_path / "comparison.json").read_text())["models"]] == ["flap 20 %"]


def test_job_whose_time_is_over_goes_on_where_it_is(tmp_path):
    pytest.importorskip("submitit", reason="submitit is an optional dependency")
    cell = one(tmp_path, recovery=Recovery())
    delayed = CellJob(Machine()).checkpoint(cell)
    assert delayed.args == (cell,)
    assert delayed.result() == "finished"


def test_job_killed_before_it_began_is_not_what_it_was_before(tmp_path, monkeypatch, capsys):
    config = settings(tmp_path, ratios=[0.2], methods={"flap": {"class_path": "callbacks.FLAP"}}, engine="submitit")
    assert sweep(settings(**{**vars(config), "directory": tmp_path, "engine": "process"}), run=Machine()) == 0

    class Job:
        job_id = "17"
        paths = SimpleNamespace(stderr="17.err")

        def done(self) -> bool:
            return True

        def exception(self) -> Exception:
            return RuntimeError("killed in the queue")

    executor = SimpleNamespace(cluster="slurm", map_array=lambda job, cells: [Job() for _ in cells])
    monkeypatch.setattr(engines, "_executor", lambda jobs, folder: executor)
    assert sweep(config, overwrite=True, run=Machine()) == 2
    for cell in plan_cells(config):
        record = Record.load(cell)
        assert record.status == "failed"
        assert "job 17 ended with RuntimeError: killed in the queue" in record.error
        assert steps_to_do(cell) == list(cell.steps)


def test_jobs_that_cannot_be_submitted_are_told(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is an optional dependency")

    def failure(**options: object) -> str:
        with pytest.raises(UsageError) as caught:
            sweep(settings(tmp_path, engine="submitit", submitit=Jobs(**options)), run=Machine())
        return str(caught.value)

    assert "timeout_minutes" in failure(cluster="local", parameters={"timeout_minutes": 3})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "submitit does not take cluster slurm" in failure(cluster="slurm")
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "pip install" in failure()


# The table


def test_table_has_mean_and_standard_deviation_over_seeds(tmp_path, monkeypatch, capsys):
    config = settings(tmp_path, seeds=[1, 2, 3], ratios=[0.2])
    cells = plan_cells(config)
    done = [cell for cell in cells if cell.name != "sleb_0.2_s2"]
    values = {"flap": [10.0, 12.5, 17.0], "sleb": [20.0, 24.0]}
    column = [9.0, *values["flap"], *values["sleb"]]
    comparison = SimpleNamespace(
        paths=[cell.directory / "results.json" for cell in done],
        rows=[
            Row("perplexity.x.128", "Perplexity", "perplexity", [Figure(v) for v in column]),
            Row(
                "zero_shot.boolq.acc.9",
                "boolq",
                "accuracy",
                [Figure(None, reason="no"), *(Figure(0.5) for _ in column[1:])],
            ),
            Row("zero_shot.piqa.acc.9", "piqa", "accuracy", [*map(Figure, (0.1, 0.2, None, 0.4, None, 0.6))]),
            Row("something.new", "New | thing", "number", [Figure(1.0) for _ in column]),
        ],
    )
    summary = summarise(comparison, cells)
    dense, flap, sleb = summary.lines
    assert (dense.method, dense.ratio, dense.figures["perplexity.x.128"].mean) == ("dense", None, 9.0)
    assert dense.figures["perplexity.x.128"].stdev is None
    assert dense.figures["zero_shot.boolq.acc.9"].n == 0
    figure = flap.figures["perplexity.x.128"]
    assert figure.mean == pytest.approx(sum(values["flap"]) / 3)
    assert figure.stdev == pytest.approx(statistics.stdev(values["flap"]))
    assert (sleb.seeds, sleb.failed, sleb.figures["perplexity.x.128"].n) == ([1, 3], [2], 2)
    write_summary(summary, tmp_path)
    text = (tmp_path / "sweep.md").read_text()
    assert "| flap | 20 % | 3 | 13.17 ± 3.55 | 50.0 % ± 0.0 % | 30.0 % ± 14.1 % (2 of 3) |" in text
    assert "| sleb | 20 % | 2 of 3 | 22.00 ± 2.83 | 50.0 % ± 0.0 % | 60.0 % (1 of 3) |" in text
    assert "| dense | – | 1 | 9.00 | – | 10.0 % |" in text
    assert "(2 of 3)` behind a figure" in text
    assert "New" not in text  # all figures are in the other files
    table = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [line["method"] for line in table] == ["dense", "flap", "sleb"]
    assert float(table[1]["perplexity.x.128.stdev"]) == pytest.approx(figure.stdev)
    assert (table[0]["zero_shot.boolq.acc.9"], table[2]["something.new"]) == ("", "1.0")
    assert [line["zero_shot.piqa.acc.9.n"] for line in table] == ["1", "2", "1"]
    assert [line["perplexity.x.128.n"] for line in table] == ["1", "3", "2"]
    # On the terminal it says the same, and what does not fit stands in a table of its own with the names.
    monkeypatch.setattr(board, "Console", lambda **options: Console(**{"width": 70, **options}, force_terminal=True))
    board.print_summary(summary, tmp_path)
    shown = capsys.readouterr().out
    assert "(2 of 3)" in shown
    titles = [line for line in shown.splitlines() if "Method" in line]
    assert (len(titles), ["piqa" in line for line in titles]) == (2, [False, True])
    assert max(len(line) for line in shown.splitlines() if "│" in line) <= 70
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [one["name"] for one in record["columns"]] == [row.name for row in comparison.rows]
    assert record["lines"][1]["figures"]["perplexity.x.128"]["n"] == 3


# As a user meets it


@pytest.fixture
def pico_sweep(pico_dir, tmp_path, monkeypatch) -> Path:
    """A sweep of the pico model as YAML, to be run from the directory that it is in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "s.yaml"
    text = {"source": "embedded", "sequence_length": 32, "max_tokens": 1024}
    config = {
        "config_version": 1,
        "output_dir": "out",
        "model": {"pretrained": str(pico_dir), "dtype": "float32"},
        "data": {"path": "embedded", "calibration": {"source": "embedded", "samples": 2, "sequence_length": 16}},
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False},
        "methods": {
            "slm": {"class_path": "callbacks.SlidingWindowMerging"},
            "sleb": {"class_path": "callbacks.SLEB", "init_args": {"protect_first": 3, "protect_last": 3}},
        },
        "ratios": [0.2],
        "measure": [{"class_path": "callbacks.Perplexity", "init_args": {"texts": [text]}}],
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def test_sweep_of_a_method_that_works_and_one_that_does_not(pico_sweep, monkeypatch, capsys):
    """The real command line; what works runs in this process, which has loaded everything."""

    def runner(self: ProcessRunner, arguments: list[str], log: Path) -> int:
        if "sleb" in arguments[2]:
            return start(self, arguments, log)
        with log.open("a") as out, contextlib.redirect_stdout(out):
            main(arguments)
        return 0

    start = ProcessRunner.__call__
    monkeypatch.setattr(ProcessRunner, "__call__", runner)
    with pytest.raises(SystemExit) as done:
        main(["sweep", "--config", str(pico_sweep)])
    assert done.value.code == 1
    out = capsys.readouterr().out
    directory = Path("out/slm_0.2_s1234")
    results = json.loads((directory / "results.json").read_text())
    assert (results["model"]["label"], results["model"]["num_layers"]) == ("slm 20 %", 4)
    assert json.loads((directory / "export" / "config.json").read_text())["num_hidden_layers"] == 4
    plan = json.loads((directory / "plan.json").read_text())
    assert (plan["method"]["init_args"]["ratio"], plan["calibration"]["seed"]) == (0.2, 1234)
    failed = Path("out/sleb_0.2_s1234")
    assert "$ prune --config" in (failed / "log.txt").read_text()
    record = json.loads((failed / "cell.json").read_text())
    assert record["status"] == "failed"
    assert "error: " in record["error"]
    assert "Traceback" not in record["error"]
    assert "Mend the cause" in out
    dense, slm, sleb = json.loads(Path("out/sweep.json").read_text())["lines"]
    (perplexity,) = [name for name in slm["figures"] if name.startswith("perplexity.")]
    assert dense["figures"]["num_layers"]["mean"] == 6
    assert slm["figures"][perplexity]["mean"] == results["perplexity"][0]["value"]
    card = (directory / "export" / "README.md").read_text()
    assert "Not measured yet" not in card
    assert "| Perplexity " in card
    assert sleb["failed"] == [1234]
    # The generated configs are whole: they run by themselves, from anywhere.
    assert yaml.safe_load((directory / "measure.yaml").read_text())["model"]["pretrained"] == "out/slm_0.2_s1234/export"
    again = Machine()
    assert sweep(parse("--config", str(pico_sweep)), run=again) == 0
    assert again.commands == [("prune", "sleb_0.2_s1234"), ("test", "sleb_0.2_s1234")]


@pytest.mark.long
def test_sweep_with_recovery_as_jobs(pico_sweep, capsys):
    pytest.importorskip("submitit", reason="submitit is an optional dependency")
    recovery = {
        "model": {"lora": {"r": 2, "alpha": 4}, "warmup_steps": 1},
        "data": {"val_size": 2, "max_rows": 12, "cutoff": 256},
        "trainer": {"max_steps": 2},
    }
    words = ["--recovery", json.dumps(recovery), "--engine", "submitit", "--submitit.cluster", "local"]
    methods = {"slm": {"class_path": "callbacks.SlidingWindowMerging"}, "flap": {"class_path": "callbacks.FLAP"}}
    sizes = ["--methods", json.dumps(methods), "--dense", "false", "--seeds", "[3]"]
    main(["sweep", "--config", str(pico_sweep), *words, *sizes])
    for method in ("slm", "flap"):
        cell = Path("out") / f"{method}_0.2_s3_recovered"
        assert json.loads((cell / "results.json").read_text())["model"]["label"] == f"{method} 20 %, recovered"
        assert (cell / "checkpoints").is_dir()
        assert (cell / "config_fit.yaml").is_file()
    before = (Path("out/slm_0.2_s3_recovered/results.json")).stat().st_mtime_ns
    main(["sweep", "--config", str(pico_sweep), *words, *sizes])
    assert (Path("out/slm_0.2_s3_recovered/results.json")).stat().st_mtime_ns == before


@pytest.mark.long
def test_terminated_sweep_ends_its_process(pico_sweep):
    command = [sys.executable, str(ROOT / "main.py"), "sweep", "--config", str(pico_sweep)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = Path("out/dense/log.txt")
    deadline = time.monotonic() + 120
    while not log.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=90)[0]
    assert process.returncode == 128 + signal.SIGTERM, out
    assert json.loads(Path("out/dense/cell.json").read_text())["status"] == "interrupted"
    assert "Traceback" not in out
    # Nobody writes to the log any more.
    size = log.stat().st_size
    time.sleep(3)
    assert log.stat().st_size == size
