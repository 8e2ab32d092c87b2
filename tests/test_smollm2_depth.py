"""Methods that remove whole layers of SmolLM2-135M-Instruct, through the command line."""

import json
from pathlib import Path

import pytest
import yaml

from slm_pl.cli import main
from tests.helpers.shared import SHARED, needs_shared
from tests.helpers.smollm2 import MODEL, NEEDS_SMOLLM2, golden_of

pytestmark = NEEDS_SMOLLM2


def scored(name: str, run: Path, method: dict) -> dict:
    """The plan that `main.py prune` makes on the ids of a golden file."""
    config = {
        "model": {"pretrained": MODEL, "dtype": "float32"},
        "data": {"calibration": {"source": str(SHARED / "reference" / "golden" / f"{name}.json"), "batch_size": 4}},
        "trainer": {"default_root_dir": str(run), "accelerator": "cpu", "logger": False, "callbacks": [method]},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    main(["prune", "--config", str(run / "config.yaml")])
    return json.loads((run / "plan.json").read_text())


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize(
    "criterion", ["magnitude", *(pytest.param(name, marks=pytest.mark.long) for name in ("taylor", "perplexity"))]
)
def test_shortened_llama_repeats_the_published_program(criterion, tmp_path):
    golden = golden_of("shortened_ppl" if criterion == "perplexity" else f"shortened_{criterion}")
    method = {"class_path": "callbacks.ShortenedLLaMA", "init_args": {"criterion": criterion, "remove_layers": 6}}
    plan = scored("shortened_ppl" if criterion == "perplexity" else "shortened_taylor", tmp_path, method)
    scores = [row["score"] for row in plan["trace"]]
    assert [row["layer"] for row in plan["trace"]] == list(range(30))
    assert sorted(range(30), key=scores.__getitem__) == golden["block_order"]
    assert plan["outcome"]["order"] == golden["block_order_plus"][:6]
    assert plan["outcome"]["order"] == golden["wikitext2_8192_ppl"]["plus_rm6"]["removed_in_order"]
    if criterion == "perplexity":
        rows = golden["csv_files"]["all_ppl_unsorted.csv"][1:]
        assert [row[0] for row in rows] == list(range(30))
        assert scores == pytest.approx([row[1] for row in rows], rel=1e-3)
        assert (plan["outcome"]["layer_forwards"], plan["outcome"]["head_forwards"]) == (30 + 29 + 435, 31)
        return
    rows = golden["csv_files"]["block_score_all.csv"][1:31]
    assert [row[0] for row in rows] == [f"model.layers.{layer}" for layer in range(30)]
    assert scores == pytest.approx([row[1] for row in rows], rel=1e-3)
    details = golden["csv_files"]["block_score_detail.csv"][1:31]
    for row, detail in zip(plan["trace"], details, strict=True):
        assert list(row["tensors"].values()) == pytest.approx(detail[1:], rel=1e-3)


@pytest.mark.shared
@pytest.mark.long
@needs_shared
def test_sleb_repeats_the_published_program(tmp_path):
    """Two of its six phases, every candidate; all six take three minutes."""
    golden = golden_of("sleb")
    plan = scored("sleb", tmp_path, {"class_path": "callbacks.SLEB", "init_args": {"remove_layers": 2}})
    order = golden["removal_order"][:2]
    assert plan["outcome"]["order"] == order
    assert plan["steps"] == [{"layers": sorted(order), "kind": "drop_layers"}]
    for step in golden["steps"][:2]:
        rows = [row for row in plan["trace"] if row["phase"] == step["step"]]
        assert [row["layer"] for row in rows] == step["candidates"]
        losses = [row["score"] * golden["seqlen"] * golden["windows"] for row in rows]
        assert losses == pytest.approx(step["loss"], rel=1e-5)
    assert {row["phase"] for row in plan["trace"]} == {step["step"] for step in golden["steps"][:2]}
