import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from slm_pl.compression import modeling, surgery
from slm_pl.compression.plan import (
    Base,
    Calibration,
    DropLayers,
    KeepChannels,
    KeepHidden,
    MergeLayers,
    Method,
    Plan,
)
from slm_pl.console import load_example
from slm_pl.errors import UsageError
from slm_pl.export import load_compressed, save_compressed
from tests.helpers.pico import pico_model
from tests.helpers.run import IDS, logits_of
from tests.helpers.tokenizer import pico_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "Describe the décoder layer."


def compressed(model_type: str = "llama"):
    """A model that two plans in sequence made smaller, from six layers to three."""
    model = pico_model(model_type, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.config._name_or_path = "some/model"
    calibration = Calibration("embedded", 10, 128, 1234, "cd")
    first = Method("callbacks.SlidingWindowMerging", {"threshold": None, "remove_layers": 2})
    plans = [Plan(Base.of(model), first, calibration, (MergeLayers(2, 4),), ({"low": 2, "high": 4},))]
    surgery.apply(model, plans[0])
    plans.append(Plan(Base.of(model), Method("callbacks.Other", {"count": 1}), None, (DropLayers((1,)),)))
    surgery.apply(model, plans[1])
    return model, plans


def narrowed(model_type: str = "llama", *others: KeepChannels):
    """A model whose layers differ in width: one plan with a bias, and one that drops a layer."""
    model = pico_model(model_type, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.config._name_or_path = "some/model"
    steps = (KeepChannels(1, "attention", (1,), "layers.1.attention.bias"), KeepChannels(4, "mlp", (2, 3, 47)))
    bias = torch.linspace(-1, 1, 32)
    first = Plan(Base.of(model), Method("callbacks.FLAP", {"ratio": 0.1}), None, steps + others)
    plans = [first.with_tensors({"layers.1.attention.bias": bias})]
    surgery.apply(model, plans[0])
    plans.append(Plan(Base.of(model), Method("callbacks.LayerRemoval", {"layers": [2]}), None, (DropLayers((2,)),)))
    surgery.apply(model, plans[1])
    return model, plans


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_round_trip(model_type, tmp_path):
    model, plans = compressed(model_type)
    logits = logits_of(model)
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", plans, recovered=False)
    assert path == tmp_path / "export"
    loaded, tokenizer, loaded_plans = load_compressed(path)
    assert torch.equal(logits_of(loaded), logits)
    assert not torch.equal(logits, logits_of(pico_model(model_type)))
    assert loaded_plans == plans
    assert tokenizer(TEXT).input_ids == pico_tokenizer()(TEXT).input_ids
    assert loaded.generation_config.eos_token_id == 1
    assert (path / "plan.json").read_text() == plans[0].file_text
    assert (path / "plan.2.json").read_text() == plans[1].file_text

    stock = AutoModelForCausalLM.from_pretrained(path)
    assert stock.config.num_hidden_layers == len(stock.model.layers) == 3
    assert torch.equal(logits_of(stock), logits)
    assert AutoTokenizer.from_pretrained(path)(TEXT).input_ids == pico_tokenizer()(TEXT).input_ids
    assert {p.suffix for p in path.iterdir()} == {
        ".json",
        ".safetensors",
        ".md",
        ".sha256",
        ".svg",
        ".png",
    }  # no pickle, no code


def test_model_card_says_what_was_done(tmp_path):
    model, plans = compressed()
    # Independent count: a layer is q, o 32x32; k, v 16x32; three of 48x32; two norms.
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    dense, pruned = (2 * 512 * 32 + 32 + layers * layer for layers in (6, 3))
    for recovered in (False, True):
        path = save_compressed(model, pico_tokenizer(), tmp_path / str(recovered), plans, recovered)
        card = (path / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transformers\n")
        assert "Made from `some/model`: 6 → 3 decoder layers" in card
        assert f"{dense:,} → {pruned:,} parameters ({1 - pruned / dense:.1%} fewer)" in card
        assert ("Recovered by training" in card) is recovered
        assert ("Not trained after" in card) is not recovered
        assert "| 1 | `callbacks.SlidingWindowMerging(remove_layers=2)` | merge layers 2–4 into one" in card
        assert "| 2 | `callbacks.Other(count=1)` | remove layers 1 |" in card
        assert all(f"`{plan.sha256}`" in card for plan in plans)


def test_model_card_of_a_dense_model(tmp_path):
    model = pico_model()
    model.config._name_or_path = "some/model"
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", [], recovered=True)
    assert "`some/model`, " in (path / "README.md").read_text()
    assert "no plan was applied" in (path / "README.md").read_text()
    assert load_compressed(path)[2] == []


@pytest.mark.parametrize("failing", ["tokenizer", "plan"])
def test_error_half_way_leaves_nothing(tmp_path, monkeypatch, failing):
    model, plans = compressed()
    tokenizer = pico_tokenizer()

    def fail(directory, *arguments):
        where = directory if failing == "tokenizer" else directory.parent
        assert (where / "model.safetensors").is_file()  # half the work is done
        raise RuntimeError("boom")

    if failing == "tokenizer":
        monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    else:
        monkeypatch.setattr(Plan, "save", lambda self, path: fail(path))
    with pytest.raises(RuntimeError, match="boom"):
        save_compressed(model, tokenizer, tmp_path / "runs" / "export", plans, recovered=False)
    assert list((tmp_path / "runs").iterdir()) == []


def test_existing_directory(tmp_path):
    model, plans = compressed()
    (tmp_path / "stale").write_text("old")
    with pytest.raises(UsageError, match="exists and is not empty.*--overwrite"):
        save_compressed(model, pico_tokenizer(), tmp_path, plans, recovered=False)
    assert os.listdir(tmp_path) == ["stale"]
    save_compressed(model, pico_tokenizer(), tmp_path, plans, recovered=False, overwrite=True)
    assert not (tmp_path / "stale").exists()
    assert torch.equal(logits_of(load_compressed(tmp_path)[0]), logits_of(model))


@pytest.mark.parametrize("name", ["none", "runs/none"])
def test_missing_export_is_never_taken_for_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"There is no directory {name}"):
        load_compressed(name)
    (tmp_path / "runs" / "none").mkdir(parents=True)
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=f"{name}/? holds no config.json"):
        load_compressed(name)


def test_relative_directory(tmp_path, monkeypatch):
    model, plans = compressed()
    monkeypatch.chdir(tmp_path)
    save_compressed(model, pico_tokenizer(), "export", plans, recovered=False)
    assert torch.equal(logits_of(load_compressed("export")[0]), logits_of(model))
    assert load_compressed(Path("export"))[2] == plans


@pytest.mark.parametrize("unequal", [False, True], ids=["depth", "width"])
def test_loads_in_a_python_without_this_project(unequal, tmp_path):
    model, plans = narrowed("qwen3", KeepChannels(5, "attention", ())) if unequal else compressed("qwen3")
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", plans, recovered=True)
    torch.save({"ids": IDS, "logits": logits_of(model)}, tmp_path / "expected.pt")
    program = f"""
import sys
sys.modules["slm_pl"] = sys.modules["callbacks"] = None  # importing them raises ImportError
for name in ("slm_pl", "callbacks"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + " can be imported")
import json, torch
{load_example(str(path), "own code" if unequal else "stock")}
torch.set_num_threads({torch.get_num_threads()})  # equal to the last bit with as many threads only
expected = torch.load("expected.pt", weights_only=True)
with torch.inference_mode():
    logits = model(input_ids=expected["ids"]).logits
    longer = [
        model.generate(expected["ids"][:1], max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=use)
        for use in (True, False)
    ]
print(json.dumps({{
    "equal": torch.equal(logits, expected["logits"]),
    "layers": model.config.num_hidden_layers,
    "class": type(model).__name__,
    "shape": list(longer[0].shape),
    "cached": torch.equal(*longer),
    "ids": tokenizer({TEXT!r}).input_ids,
    "foreign": [name for name in sys.modules if name.split(".")[0] in ("peft", "lightning", "lm_eval")],
}}))
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "equal": True,
        "layers": 5 if unequal else 3,
        "class": "PrunedQwen3ForCausalLM" if unequal else "Qwen3ForCausalLM",
        "shape": [1, IDS.shape[1] + 4],
        "cached": True,
        "ids": pico_tokenizer()(TEXT).input_ids,
        "foreign": [],
    }


def test_unequal_layers_bring_their_code_and_nothing_else_that_runs(tmp_path):
    model, plans = narrowed()
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", plans, recovered=False)
    assert {p.suffix for p in path.iterdir()} == {
        ".json",
        ".safetensors",
        ".md",
        ".py",
        ".png",
        ".svg",
        ".sha256",
    }  # no .bin, no .pt
    assert [p.name for p in path.glob("*.py")] == ["modeling_pruned.py"]
    code = (path / "modeling_pruned.py").read_text()
    source = Path(modeling.__file__).read_text()
    assert code.startswith(source)
    ours = [line for line in code.removeprefix(source).splitlines() if line]
    assert ours == [
        "from transformers import LlamaForCausalLM  # noqa: E402",
        "PrunedLlamaForCausalLM = with_widths(LlamaForCausalLM)",
    ]
    imported = set(re.findall(r"^(?:from|import) ([\w.]+)", code, re.MULTILINE))
    assert imported == {"collections.abc", "typing", "torch", "transformers"}
    config = json.loads((path / "config.json").read_text())
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_pruned.PrunedLlamaForCausalLM"}
    assert config["architectures"] == ["PrunedLlamaForCausalLM"]
    assert [(w["attention"], w["mlp"]) for w in config["layer_widths"]] == [(2, 48), (1, 48), (2, 48), (2, 3), (2, 48)]
    assert [w.get("attention_bias", False) for w in config["layer_widths"]] == [False, True, False, False, False]

    loaded, _, loaded_plans = load_compressed(path)
    theirs = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert loaded_plans == plans
    assert torch.equal(loaded_plans[0].tensors["layers.1.attention.bias"], torch.linspace(-1, 1, 32))
    for one in (loaded, theirs):
        assert torch.equal(logits_of(one), logits_of(model))
    # What was loaded can be exported again, by either way, and is the same.
    for number, one in enumerate((loaded, theirs)):
        again = save_compressed(one, pico_tokenizer(), tmp_path / f"again{number}", plans, recovered=False)
        for name in ("config.json", "modeling_pruned.py", "README.md"):
            assert (again / name).read_text() == (path / name).read_text()
        assert torch.equal(logits_of(load_compressed(again)[0]), logits_of(model))


def test_equal_widths_need_no_code(tmp_path):
    for number, steps in enumerate(
        (
            [KeepChannels(layer, "mlp", tuple(range(layer, layer + 40))) for layer in range(6)],
            [KeepHidden(tuple(range(4, 32)))],
        )
    ):
        model = pico_model("qwen3")
        plan = Plan(Base.of(model), Method("x", {}), None, tuple(steps))
        surgery.apply(model, plan)
        path = save_compressed(model, pico_tokenizer(), tmp_path / str(number), [plan], recovered=False)
        assert not list(path.glob("*.py"))
        assert "auto_map" not in json.loads((path / "config.json").read_text())
        stock = AutoModelForCausalLM.from_pretrained(path)
        assert type(stock).__module__.startswith("transformers.")
        assert torch.equal(logits_of(stock), logits_of(model))
        assert "trust_remote_code" not in (path / "README.md").read_text()


@pytest.mark.parametrize(
    "steps",
    [
        [KeepChannels(1, "mlp", tuple(range(30)))],
        [KeepChannels(1, "attention", (0,))],
        [KeepChannels(1, "attention", ()), KeepChannels(4, "mlp", ())],
    ],
    ids=["channels", "heads", "whole groups"],
)
def test_stock_transformers_refuses_unequal_layers_and_draws_no_weights(steps, tmp_path):
    model = pico_model()
    surgery.apply(model, Plan(Base.of(model), Method("x", {}), None, tuple(steps)))
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", [], recovered=False)
    for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained):
        with pytest.raises((RuntimeError, ValueError)):
            load(path, trust_remote_code=False)
    assert torch.equal(logits_of(load_compressed(path)[0]), logits_of(model))


@pytest.mark.parametrize("unequal", [False, True], ids=["depth", "width"])
def test_the_card_shows_the_lines_that_load_it(unequal, tmp_path, monkeypatch):
    model, plans = narrowed() if unequal else compressed()
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", plans, recovered=False)
    card = (path / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    assert ("trust_remote_code=True" in code.group(1)) is unequal
    assert ('`slm_pl.export.load_compressed(".")` loads it without running that file' in card) is unequal
    assert ("`modeling_pruned.py` beside this file" in card) is unequal
    monkeypatch.chdir(path)
    names: dict[str, object] = {}
    exec(code.group(1), names)
    assert torch.equal(logits_of(names["model"]), logits_of(model))  # type: ignore[arg-type]
    if unequal:
        assert torch.equal(logits_of(load_compressed(".")[0]), logits_of(model))


def test_the_card_says_how_wide_the_layers_are(tmp_path):
    model, plans = narrowed()
    card = (save_compressed(model, pico_tokenizer(), tmp_path / "e", plans, False) / "README.md").read_text()
    removed = (16 + 8 + 8 + 16) * 32 + 45 * 3 * 32 - 32, 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    dense = 2 * 512 * 32 + 32 + 6 * removed[1]
    assert f"6 → 5 decoder layers, {dense:,} → {dense - sum(removed):,} parameters" in card
    rows = [line.split(" | ") for line in card.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [row[0] for row in rows] == [f"| {number}" for number in range(1, len(plans) + 1)]
    told = [what for row in rows for what in row[2].removesuffix(" |").split("<br>")]
    assert any(re.fullmatch(r"keep 1 KV groups? in .*\b1\b.*, with a bias in their place", what) for what in told)
    assert any(re.fullmatch(r"keep 3 MLP channels in .*\b4\b.*", what) for what in told)
    assert "remove layers 2" in told
    assert all(f"`{plan.sha256}`" in card for plan in plans)
