"""The real SmolLM2-135M-Instruct, through the command line."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from slm_pl.cli import main
from tests.helpers.shared import SHARED, needs_shared
from tests.helpers.smollm2 import MODEL, NEEDS_SMOLLM2, ROOT, golden_of

pytestmark = NEEDS_SMOLLM2


@pytest.mark.shared
@pytest.mark.long
@needs_shared
@pytest.mark.parametrize(("threshold", "layers", "batch_size"), [(0.72, 22, 1), (0.85, 26, 3)])
def test_prune_repeats_the_published_program(threshold, layers, batch_size, tmp_path):
    """The authors' setting; their program has batches of one, and the score is of each sample whatever the batch."""
    golden_file = SHARED / "reference" / "golden" / f"slm_T{threshold}_s1234.json"
    golden = json.loads(golden_file.read_text())
    published = yaml.safe_load((ROOT / "configs" / "parts" / "slm_published.yaml").read_text())
    assert published["init_args"]["threshold"] == 0.72
    config = {
        "model": {"pretrained": MODEL, "dtype": "float32"},
        "data": {"calibration": {"source": str(golden_file), "batch_size": batch_size}},
        "trainer": {
            "default_root_dir": str(tmp_path),
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [
                {**published, "init_args": {**published["init_args"], "threshold": threshold}},
                {"class_path": "callbacks.ExportCheckpoint", "init_args": {"output_dir": str(tmp_path / "export")}},
            ],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["prune", "--config", str(tmp_path / "config.yaml")])
    plan = json.loads((tmp_path / "export" / "plan.json").read_text())
    windows = [list(range(step["low"], step["high"] + 1)) for step in plan["steps"]]
    assert windows == golden["records"]
    tries = [t for t in golden["tries"] if not t["noop_self_merge"]]
    assert [(t["low"], t["high"], t["accepted"]) for t in plan["trace"]] == [
        (t["low"], t["high"], t["accepted"]) for t in tries
    ]
    assert [t["similarity"] for t in plan["trace"]] == pytest.approx([t["sim"] for t in tries], abs=1e-4)
    exported = json.loads((tmp_path / "export" / "config.json").read_text())
    assert exported["num_hidden_layers"] == golden["layers"] == layers


@pytest.mark.long
def test_prune_two_training_steps_export_test(tmp_path, monkeypatch):
    """The quickstart's own configs, cut down."""
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    config["data"]["calibration"].update(samples=2, sequence_length=48)
    config["data"]["fitting"][0].update(samples=2, sequence_length=48)
    config["data"].update(batch_size=2, val_size=2, cutoff=48, max_rows=40)
    trainer = config["trainer"]
    trainer.update(default_root_dir=str(tmp_path), max_steps=2, val_check_interval=2, logger=False)
    merging, similarity, export, checkpoint = trainer["callbacks"]
    trainer["callbacks"][-1] = yaml.safe_load((ROOT / "configs" / checkpoint).read_text())
    assert similarity == {"class_path": "callbacks.RepresentationSimilarity"}
    merging["init_args"]["remove_layers"] = 4
    export["init_args"] = {"output_dir": str(tmp_path / "export"), "compressed_dir": str(tmp_path / "pruned")}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "fit.yaml")])

    test = yaml.safe_load((ROOT / "configs" / "quickstart_dense.yaml").read_text())
    test["model"] = {"pretrained": str(tmp_path / "export"), "dtype": "float32"}
    test["data"] = {"path": "embedded"}
    test["trainer"]["default_root_dir"] = str(tmp_path)
    parts = [yaml.safe_load((ROOT / "configs" / part).read_text()) for part in test["trainer"]["callbacks"]]
    efficiency, perplexity, zero_shot = test["trainer"]["callbacks"] = parts
    efficiency["init_args"] = {"new_tokens": 4, "warmup": 1, "repeats": 2}
    perplexity["init_args"]["texts"][0]["max_tokens"] = 256
    zero_shot["init_args"]["limit"] = 4
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    main(["test", "--config", str(tmp_path / "test.yaml")])

    results = json.loads((tmp_path / "results.json").read_text())
    plan_text = (tmp_path / "export" / "plan.json").read_text()
    assert results["model"]["num_layers"] == 26
    # Independent count: 30 layers of 3,540,096, the embedding (tied) and the final norm are 134,515,008.
    assert results["model"]["num_parameters"] == 134_515_008 - 4 * 3_540_096
    assert results["model"]["base"] == MODEL
    assert json.loads(plan_text)["base"]["num_parameters"] == 134_515_008
    assert results["perplexity"][0]["tokens"] == 2 * 127
    assert 1 < results["perplexity"][0]["value"] < 1e4
    assert results["zero_shot"]["tasks"]["embedded_docstrings"]["n"] == 4
    assert set(results["missing"]) == {"gpu_utilisation", "gpu_energy", "gpu_memory"}

    # The pictures of the dense model and of the search go with both exports.
    for name in (
        "representation_similarity_before.json",
        "representation_similarity_before.png",
        "block_importance.png",
    ):
        assert (tmp_path / "export" / name).read_bytes() == (tmp_path / "pruned" / name).read_bytes()
    matrix = json.loads((tmp_path / "export" / "representation_similarity_before.json").read_text())["matrix"]
    assert (len(matrix), len(matrix[0])) == (30, 30)
    assert min(matrix[i][i + 1] for i in range(28)) > 0.8 > matrix[0][28]  # neighbours are alike, the ends are not

    from transformers import AutoModelForCausalLM

    ids = torch.arange(1000, 1032).unsqueeze(0)
    with torch.inference_mode():
        pruned, recovered = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(input_ids=ids).logits for name in ("pruned", "export")
        )
    difference = (pruned - recovered).abs().max()
    assert 0 < difference < 10  # two steps move the logits, and a little only


def pruned_as_published(run: Path, golden: dict, method: dict) -> dict:
    """The plan on a golden run's token ids."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "ids.json").write_text(json.dumps(golden["input_ids"]))
    config = {
        "model": {"pretrained": MODEL, "dtype": "float32"},
        "data": {"calibration": {"source": str(run / "ids.json"), "batch_size": 10}},
        "trainer": {"default_root_dir": str(run), "accelerator": "cpu", "logger": False, "callbacks": [method]},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    main(["prune", "--config", str(run / "config.yaml")])
    return json.loads((run / "plan.json").read_text())


LLM_PRUNER = {
    "taylor_param_first_r0.25_mlp_only": {"layer_ratio": 0.25, "attention_layers": None},
    "taylor_param_first_r0.34": {"layer_ratio": 0.34},
    "l2_r0.34": {"layer_ratio": 0.34, "importance": "magnitude", "grouping": "mean"},
}
"""Each recorded run of the authors' program, and how it is asked for here."""


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name.endswith("only") else name for name in LLM_PRUNER]
)
def test_llm_pruner_repeats_the_published_program(name, tmp_path):
    golden = golden_of("llm_pruner")
    run = golden["runs"][name]
    ids = run["input_ids"] or golden["runs"]["taylor_param_first_r0.34"]["input_ids"]
    arguments = {"as_published": True, **LLM_PRUNER[name]}
    plan = pruned_as_published(
        tmp_path, {"input_ids": ids}, {"class_path": "callbacks.LLMPruner", "init_args": arguments}
    )
    kept = {(step["layer"], step["group"]): step["indices"] for step in plan["steps"]}
    rows = {(row["layer"], row["group"]): row["scores"] for row in plan["trace"]}
    assert plan["base"]["num_parameters"] - plan["outcome"]["removed_parameters"] == run["params_after"]
    assert sorted({layer for layer, _ in kept}) == sorted(map(int, run["layers"])) == list(range(4, 28))
    for layer, published in ((int(number), layer) for number, layer in run["layers"].items()):
        # Of neighbours in the order, the scores are apart by as little as 1e-5: one channel may be another.
        assert len(set(kept[layer, "mlp"]) - set(published["kept_mlp_channels"])) <= 1
        assert len(kept[layer, "mlp"]) == published["n_kept_mlp"]
        assert sum(rows[layer, "mlp"]) == pytest.approx(published["mlp_imp_sum"], rel=1e-5)
        if published["mlp_imp"]:
            assert rows[layer, "mlp"] == pytest.approx(published["mlp_imp"], rel=3e-4)
        if "kept_kv_groups" in published:
            assert kept[layer, "attention"] == published["kept_kv_groups"]
            assert rows[layer, "attention"] == pytest.approx(published["kv_group_importance"], rel=1e-4)
        else:
            assert (layer, "attention") not in kept


@pytest.mark.shared
@needs_shared
@pytest.mark.long
def test_llm_pruner_scores_the_heads_that_go(tmp_path, recwarn):
    """Where the authors' program scores others, and crashes where no whole KV group fits."""
    golden = golden_of("llm_pruner")
    ids = golden["runs"]["taylor_param_first_r0.34"]["input_ids"]
    method = {"class_path": "callbacks.LLMPruner", "init_args": {"layer_ratio": 0.25}}
    plan = pruned_as_published(tmp_path, {"input_ids": ids}, method)
    assert "CRASH" in golden["ratio0.25_with_attention"]
    assert any("attention keeps its width" in str(warning.message) for warning in recwarn)
    assert {(step["group"], len(step["indices"])) for step in plan["steps"]} == {("mlp", 1152)}
    rows = {row["layer"]: row["scores"] for row in plan["trace"] if row["group"] == "attention"}
    for layer, published in golden["attention_importance_param_first"].items():
        assert rows[int(layer)] == pytest.approx(published["correct"], rel=1e-4)
        changed = published["argmin_correct"] != published["argmin_reference"]
        assert (int(layer) in golden["layers_where_misalignment_changes_choice"]) is changed
        assert rows[int(layer)].index(min(rows[int(layer)])) == published["argmin_correct"]


@pytest.mark.shared
@needs_shared
def test_flap_repeats_the_published_program(tmp_path):
    golden = golden_of("flap")
    method = {"class_path": "callbacks.FLAP", "init_args": {"ratio": 0.2, "as_published": True}}
    plan = pruned_as_published(tmp_path, golden, method)
    from slm_pl.compression.plan import Plan

    tensors = Plan.load(tmp_path / "plan.json").tensors
    kept = {(step["layer"], step["group"]): step["indices"] for step in plan["steps"]}
    rows = {(row["layer"], row["group"]): row["scores"] for row in plan["trace"]}
    for published in golden["layers"]:
        layer = published["layer"]
        assert kept.get((layer, "attention"), [0, 1, 2]) == published["kept_kv_groups"]
        channels = kept.get((layer, "mlp"), list(range(1536)))
        assert len(set(channels) ^ set(published["kept_mlp_channels"])) <= 1
        assert rows[layer, "attention"] == pytest.approx(published["attn_group_metric"], rel=1e-3, abs=1e-4)
        for group, name in (("attention", "o"), ("mlp", "down")):
            bias = tensors.get(f"layers.{layer}.{group}.bias", torch.zeros(576))
            assert bias.norm().item() == pytest.approx(published[f"{name}_bias_norm"], rel=1e-3)
            assert bias[:8].tolist() == pytest.approx(published[f"{name}_bias_first8"], rel=1e-2, abs=1e-4)
    for layer in (0, 15):
        assert rows[layer, "mlp"] == pytest.approx(golden[f"mlp_metric_layer{layer}"], rel=1e-3, abs=1e-4)
    # The published program adds a bias to every layer, this one where something was removed.
    added = sum(value.numel() for value in tensors.values())
    left = plan["base"]["num_parameters"] - plan["outcome"]["removed_parameters"]
    assert left - added == golden["params_after_excl_bias"]


@pytest.mark.shared
@pytest.mark.long
@needs_shared
def test_pruned_model_is_as_good_as_the_published_one(tmp_path):
    """FLAP's, measured on the first 8,192 recorded ids."""
    ids = json.loads((SHARED / "reference" / "golden" / "wikitext2_ids.json").read_text())["input_ids"][:8192]
    golden = golden_of("flap")
    method = {"class_path": "callbacks.FLAP", "init_args": {"as_published": True, "ratio": 0.2}}
    pruned_as_published(tmp_path, {"input_ids": golden["input_ids"]}, method)

    from slm_pl.compression import surgery
    from slm_pl.compression.plan import Plan
    from slm_pl.loading import load_model, resolve

    model = load_model(resolve(MODEL), dtype="float32")
    surgery.apply(model, Plan.load(tmp_path / "plan.json"))
    windows = torch.tensor(ids).view(-1, 128)
    losses = []
    with torch.inference_mode():
        for batch in windows.split(4):
            logits = model(input_ids=batch).logits[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
    assert torch.stack(losses).mean().exp().item() == pytest.approx(golden["wikitext2_8192_ppl_after"], rel=1e-3)


# One token through a layer of SmolLM2 (hidden size 576, 9 heads and 3 KV heads of 64, 1,536 channels), and the head.
LAYER = 576 * (9 * 64 + 2 * 3 * 64) + 9 * 64 * 576 + 3 * 576 * 1536
HEAD = 576 * 49152


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        (None, 30),
        ({"class_path": "callbacks.LayerRemoval", "init_args": {"layers": [18, 19, 20, 21, 22, 23]}}, 24),
        ({"class_path": "callbacks.WandaStructured", "init_args": {"ratio": 0.1579}}, 30),
    ],
    ids=["dense", "fewer layers", "narrower layers"],
)
def test_speed_and_its_limits(method, layers, tmp_path):
    grid = {"batch_size": 2, "prompt_tokens": 8, "new_tokens": [0, 3], "warmup": 1, "repeats": 2}
    config = {
        "model": {"pretrained": MODEL, "dtype": "float32"},
        "data": {"path": "embedded", "calibration": {"source": "embedded", "samples": 2, "sequence_length": 32}},
        "trainer": {
            "default_root_dir": str(tmp_path),
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "callbacks": [*([method] if method else []), {"class_path": "callbacks.Efficiency", "init_args": grid}],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config", str(tmp_path / "config.yaml")])
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["model"]["num_layers"] == layers
    # All of the weights but norms (and biases) are in the products, and the embedding is the head.
    inside = record["model"]["num_parameters"] - HEAD
    assert inside == pytest.approx(30 * LAYER * (1 if method is None else 0.8), rel=0.01)
    points = {(one["batch_size"], one["new_tokens"]): one for one in record["efficiency"]}
    assert set(points) == {(2, 0), (2, 3)}
    for (batch, new), one in points.items():
        work, memory = one["work"], one["memory"]
        seen = [8] if new == 0 else [8, 9, 10]
        heads = batch * (8 if new == 0 else 1)  # generate needs the logits of the last position only
        products = [batch * (8 if step == 0 else 1) * inside for step in range(len(seen))]
        attention = one["work"]["kv_bytes_per_token"] / 4 / 2 * 3 * 2  # 3 queries a key: scores and mixing
        steps = [
            linear + (heads if step == 0 else batch) * HEAD + batch * (8 if step == 0 else 1) * seen[step] * attention
            for step, linear in enumerate(products)
        ]
        assert work["prefill_macs"] == pytest.approx(steps[0], rel=0.002)
        assert work["decode_macs"] == pytest.approx(sum(steps[1:]), rel=0.002)
        if method is None or layers == 24:
            assert work["kv_bytes_per_token"] == layers * 2 * 3 * 64 * 4
        assert memory["weights"] == pytest.approx(4 * record["model"]["num_parameters"], rel=1e-4)
        assert memory.get("kv_cache") == memory.get("kv_cache_computed")
        if new:
            assert memory["kv_cache"] == batch * (8 + new - 1) * work["kv_bytes_per_token"]
        # The reckoning of the limit does not know how fast the run was; no run beats it.
        assert 0 < one["limit"]["latency_share"] < 1
        assert 0 < one["limit"]["prefill_flops_share"] < 1
        assert one["latency_s"]["min"] >= one["time_to_first_token_s"]["min"] > 0
