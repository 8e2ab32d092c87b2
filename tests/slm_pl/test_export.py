import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slm_pl.compression import surgery
from slm_pl.compression.plan import Base, Calibration, DropLayers, MergeLayers, Method, Plan
from slm_pl.errors import UsageError
from slm_pl.export import LOAD_EXAMPLE, load_compressed, save_compressed
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
    assert (path / "plan.json").read_text() == plans[0].to_json()
    assert (path / "plan.2.json").read_text() == plans[1].to_json()

    stock = AutoModelForCausalLM.from_pretrained(path)
    assert stock.config.num_hidden_layers == len(stock.model.layers) == 3
    assert torch.equal(logits_of(stock), logits)
    assert AutoTokenizer.from_pretrained(path)(TEXT).input_ids == pico_tokenizer()(TEXT).input_ids
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors", ".md"}  # no pickle, no code


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


def test_loads_in_a_python_without_this_project(tmp_path):
    model, plans = compressed("qwen3")
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
{LOAD_EXAMPLE.format(path=path)}
torch.set_num_threads({torch.get_num_threads()})  # equal to the last bit with as many threads only
expected = torch.load("expected.pt", weights_only=True)
with torch.inference_mode():
    logits = model(input_ids=expected["ids"]).logits
    longer = model.generate(expected["ids"][:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
print(json.dumps({{
    "equal": torch.equal(logits, expected["logits"]),
    "layers": model.config.num_hidden_layers,
    "shape": list(longer.shape),
    "ids": tokenizer({TEXT!r}).input_ids,
    "foreign": [name for name in sys.modules if name.split(".")[0] in ("peft", "lightning", "lm_eval")],
}}))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "equal": True,
        "layers": 3,
        "shape": [1, IDS.shape[1] + 4],
        "ids": pico_tokenizer()(TEXT).input_ids,
        "foreign": [],
    }


def test_the_card_shows_the_lines_that_load_it(tmp_path, monkeypatch):
    model, plans = compressed()
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", plans, recovered=False)
    code = re.search(r"```python\n(.*?)```", (path / "README.md").read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(path)
    names: dict[str, object] = {}
    exec(code.group(1), names)
    assert torch.equal(logits_of(names["model"]), logits_of(model))  # type: ignore[arg-type]
