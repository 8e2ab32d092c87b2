"""``prune`` of SmolLM2-135M with its weights left in their files, against the same in memory."""

import filecmp
import json
from pathlib import Path

import pytest
import yaml

from slm_pl.cli import main
from tests.helpers.smollm2 import MODEL, NEEDS_SMOLLM2

METHOD = {
    "remove_layers": 3,
    "search": "best_first",
    "similarity": "token_cosine",
    "lazy": True,
    "consolidation": "least_squares",
}
pytestmark = [*NEEDS_SMOLLM2, pytest.mark.long]


def prune(run: Path, streaming: bool) -> Path:
    """Searches, refits and exports; returns the export."""
    texts = {
        "calibration": {"samples": 4, "sequence_length": 64, "batch_size": 4},
        "fitting": [{"samples": 16, "sequence_length": 64, "seed": 1}],
    }
    export = {"class_path": "callbacks.ExportCheckpoint", "init_args": {"output_dir": str(run / "export")}}
    config = {
        "model": {"pretrained": MODEL, "dtype": "float32", "streaming": streaming},
        "data": texts,
        "trainer": {
            "default_root_dir": str(run),
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [{"class_path": "callbacks.SlidingWindowMerging", "init_args": METHOD}, export],
        },
    }
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    main(["prune", "--config", str(run / "config.yaml")])
    return run / "export"


def test_same_export_without_the_weights_in_memory(tmp_path):
    streamed, whole = prune(tmp_path / "streamed", True), prune(tmp_path / "whole", False)
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in streamed.iterdir())
    kinds = [name for name in names if name.endswith((".safetensors", ".json"))]
    assert {"plan.json", "model.safetensors", "plan.tensors.safetensors"} <= set(kinds)
    for name in kinds:
        assert filecmp.cmp(whole / name, streamed / name, shallow=False), name
    plan = json.loads((whole / "plan.json").read_text())
    assert json.loads((whole / "config.json").read_text())["num_hidden_layers"] == 27
    assert any(step["kind"] == "refit_output" for step in plan["steps"])
