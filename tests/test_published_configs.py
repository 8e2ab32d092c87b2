"""Every experiment that others published, as its config says it, on a model of the real size without weights."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import callbacks
from slm_pl import cli, trainer_cli
from slm_pl.compression import surgery
from slm_pl.compression.architecture import decoder_layers
from slm_pl.compression.plan import count_parameters
from slm_pl.compression.target import give_ratio, layers_to_remove
from slm_pl.data import CalibrationSet, CalibrationText
from slm_pl.estimate.costs import MACHINES
from slm_pl.estimate.run import estimate
from slm_pl.recovery.adapters import LoRA, add_adapters
from slm_pl.recovery.memory import GB, Sizes, training_memory

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {path.stem: path for path in sorted(ROOT.glob("configs/*.yaml")) if not path.stem.startswith("quickstart")}
MODELS = {path.stem: path for path in sorted(ROOT.glob("configs/architectures/*.json"))}

# In billions, as its owners count them.
PUBLISHED = {
    "llama1_7b": 6.738,
    "llama2_7b": 6.738,
    "vicuna_7b": 6.738,
    "llama2_13b": 13.016,
    "vicuna_13b": 13.016,
    "llama2_70b": 68.977,
    "llama3_8b": 8.030,
    "llama3_1_8b": 8.030,
    "qwen3_8b": 8.191,
    "mistral_7b": 7.248,
    "gemma3_1b": 1.000,
    "opt_6_7b": 6.658,
    "opt_13b": 12.853,
}
# What is left at the smaller published size, in billions, as the paper gives it.
LEFT = {"llama2_7b_slm": 5.52, "llama2_13b_slm": 10.48, "llama3_8b_slm": 6.50}
IDS = {
    "llama1_7b": "huggyllama/llama-7b",
    "llama2_7b": "meta-llama/Llama-2-7b-hf",
    "vicuna_7b": "lmsys/vicuna-7b-v1.3",
    "llama2_13b": "meta-llama/Llama-2-13b-hf",
    "vicuna_13b": "lmsys/vicuna-13b-v1.3",
    "llama2_70b": "meta-llama/Llama-2-70b-hf",
    "llama3_8b": "meta-llama/Meta-Llama-3-8B",
    "llama3_1_8b": "meta-llama/Llama-3.1-8B",
    "qwen3_8b": "Qwen/Qwen3-8B",
    "mistral_7b": "mistralai/Mistral-7B-v0.3",
    "gemma3_1b": "google/gemma-3-1b-pt",
    "opt_6_7b": "facebook/opt-6.7b",
    "opt_13b": "facebook/opt-13b",
}


def model_of(name: str) -> str:
    return max((model for model in MODELS if name.startswith(f"{model}_")), key=len)


def without_weights(name: str) -> torch.nn.Module:
    content = json.loads(MODELS[name].read_text())
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def run_of(path: Path, capsys, *words: str) -> dict:
    with pytest.raises(SystemExit) as done:
        cli.main(["fit", "--config", str(path), *words, "--print_config"])
    out = capsys.readouterr()
    assert done.value.code in (0, None), out.err
    return yaml.safe_load(out.out)


def methods_of(run: dict, ratio: float) -> list[callbacks.CompressionCallback]:
    give_ratio(ratio, run["trainer"]["callbacks"])
    made = []
    for callback in run["trainer"]["callbacks"]:
        module, _, name = callback["class_path"].rpartition(".")
        if module == "callbacks":
            one = getattr(callbacks, name)(**callback["init_args"])
            made += [one] if isinstance(one, callbacks.CompressionCallback) else []
    return made


def layers_in_header(text: str) -> list[tuple[int, float]]:
    """The number of layers that go, by ratio, as the comment on top says it."""
    first = re.search(r"# (\d+) of (\d+) layers go; with --ratio ([\d.]+), (\d+)\.", text)
    if first is None:
        return []
    own = re.search(r"^ratio: ([\d.]+)$", text, flags=re.M)
    assert own is not None
    return [(int(first[1]), float(own[1])), (int(first[4]), float(first[3]))]


@pytest.mark.parametrize("name", MODELS)
def test_architecture_has_as_many_parameters_as_its_owners_count(name):
    assert count_parameters(without_weights(name)) / GB == pytest.approx(PUBLISHED[name], abs=6e-4)


# Of the models that differ in their sizes only, one is enough for every day.
QUICK = {name for name in CONFIGS if not re.match(r"(llama2_13b|llama3_8b|vicuna_\d+b|llama1_7b)_", name)} | set(LEFT)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in CONFIGS])
def test_published_experiment(name, capsys, monkeypatch):
    """Its config is valid, removes what it says, adapts every projection that is left and fits on its GPUs."""
    monkeypatch.chdir(ROOT)
    text = CONFIGS[name].read_text()
    assert yaml.safe_load(text)["config_version"] == 1  # written down, not defaulted
    run = run_of(CONFIGS[name].relative_to(ROOT), capsys)
    assert run["model"]["pretrained"] == IDS[model_of(name)]
    assert run["trainer"]["default_root_dir"] == f"runs/{name}"
    recipe = (run["data"]["init_args"][key] for key in ("path", "global_batch_size", "cutoff"))
    assert (*recipe, run["trainer"]["max_epochs"]) == ("yahma/alpaca-cleaned", 64, 256, 2)

    model = without_weights(model_of(name))
    total, asked = count_parameters(model), run["ratio"]
    methods = methods_of(run, asked)
    sizes = layers_in_header(text)
    depth = [m for m in methods if hasattr(m, "remove_layers")]
    assert bool(sizes) == (len(depth) == len(methods)) == (asked != 0.2 or " 20 % of" not in text)
    for gone, ratio in sizes:
        assert layers_to_remove(model, None, ratio, len(decoder_layers(model)) - 2, "") == gone
    if sizes:
        drop = callbacks.LayerRemoval(order="reverse", remove_layers=sizes[0][0])
        plan = drop.plan(model, CalibrationSet.from_ids([], CalibrationText()))
        surgery.apply(model, plan)
        left = count_parameters(model)
        assert left / total == pytest.approx(1 - asked, abs=0.02)
        if name in LEFT:
            assert left / GB == pytest.approx(LEFT[name], abs=6e-3)
    else:
        kept = 1.0
        for method in methods:
            kept *= 1 - method.ratio
        assert kept == pytest.approx(1 - asked)

    lora = LoRA(**{key: run["model"]["lora"][key] for key in inspect.signature(LoRA).parameters})
    linear = [m for m in decoder_layers(model).modules() if isinstance(m, torch.nn.Linear)]
    adapted = add_adapters(model, lora, float32=True)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == sum(lora.r * (m.in_features + m.out_features) for m in linear)

    if model.config.model_type == "llama":
        tokens = run["data"]["init_args"]["batch_size"] * run["data"]["init_args"]["cutoff"]
        sizes_of = Sizes.of(adapted, model.config, lora.r)
        stage = run["trainer"]["strategy"]["init_args"]["stage"]
        gpus = run["trainer"]["devices"]
        memory = training_memory(sizes_of, f"deepspeed_stage_{stage}", gpus, tokens, tokens // 2)
        assert memory.weights == 2 * (count_parameters(adapted) - trained) / (gpus if stage == 3 else 1)
        assert memory.total < 80 * GB


SLOW = "llama2_70b_sleb"  # the search of 8 layers of 80 takes half a minute to rehearse


@pytest.mark.parametrize("name", [*sorted(QUICK - {SLOW}), pytest.param(SLOW, marks=pytest.mark.long)])
def test_cost_on_paper(name, monkeypatch):
    """What ``estimate`` says of it agrees with what it removes, and fits on its GPUs."""
    monkeypatch.chdir(ROOT)
    run = trainer_cli.whole_config("fit", str(CONFIGS[name].relative_to(ROOT)), names_data=False)
    give_ratio(run["ratio"], run["trainer"]["callbacks"])
    found = estimate(name, run)
    before, after = found.parameters
    assert before / GB == pytest.approx(PUBLISHED[model_of(name)], abs=6e-4)
    assert after / before == pytest.approx(1 - run["ratio"], abs=0.02)
    if name in LEFT:
        assert after / GB == pytest.approx(LEFT[name], abs=6e-3)
    phases = {phase.name: phase for phase in found.phases}
    assert set(phases) - {"search", "least squares"} == {"recovery", "perplexity", "zero-shot", "speed"}
    assert run["trainer"]["devices"] == phases["recovery"].gpus == 8
    # Llama-2-70B is 138 GB: to be searched it is streamed, and trained in stage 3.
    large = {name for name, phase in phases.items() if phase.memory > 80 * GB}
    assert large == ({"search", "perplexity", "zero-shot", "speed"} if name.startswith("llama2_70b") else set())
    # Two epochs of 110 tokens a row: forward, back, and forward again, two operations for each weight in the layers.
    in_layers = 2 * after * 3 * 2 * (51_760 - 2000) * 110 / 8
    assert phases["recovery"].flops == pytest.approx(in_layers, rel=0.25)
    assert all(phase.seconds(MACHINES["a100"], 0.4) < 24 * 3600 for phase in found.phases)


def test_every_published_pair_has_a_config():
    methods = ("slm", "slm_llm_pruner", "sleb", "shortened_perplexity", "shortened_taylor", "llm_pruner", "flap")
    models = ("llama2_7b", "llama2_13b", "llama3_8b", "vicuna_7b", "vicuna_13b")
    others = {"llama2_70b_sleb", "opt_6_7b_sleb", "opt_13b_sleb"}
    others |= {f"llama1_7b_{method}" for method in methods if method not in ("slm", "slm_llm_pruner", "sleb")}
    others |= {f"{model}_slm" for model in ("llama3_1_8b", "qwen3_8b", "mistral_7b", "gemma3_1b")}
    assert set(CONFIGS) == {f"{model}_{method}" for model in models for method in methods} | others
    assert {model_of(name) for name in CONFIGS} == set(MODELS)
