import contextlib
import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from callbacks import ExportCheckpoint, GenerationExamples
from slm_pl import loading
from slm_pl.cli import main
from slm_pl.compression.plan import Plan, count_parameters
from slm_pl.errors import UsageError
from slm_pl.module import CausalLM
from tests.helpers.run import Drop, alpaca_data, make_module, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("A decoder layer", "Describe the | function")


@pytest.fixture(scope="module")
def exports(pico_dir, tmp_path_factory) -> dict[str, Path]:
    """Two compressed models."""
    root = tmp_path_factory.mktemp("exports")
    chains = {"one": [1], "two": [0, 3]}
    for name, layers in chains.items():
        chain = [Drop(layers), ExportCheckpoint(str(root / name))]
        make_trainer(root / f"run_{name}", *chain).prune(make_module(pico_dir), alpaca_data(root / "data"))
    return {name: root / name for name in chains}


def data_of(directory: Path):
    directory.mkdir(exist_ok=True)
    (directory / "prompts.txt").write_text("\n".join(PROMPTS))
    return alpaca_data(directory, prompts=str(directory / "prompts.txt"))


def predict(run: Path, hook: GenerationExamples, module: CausalLM, *above: Drop, **options: object) -> dict:
    make_trainer(run, *above, hook, **options).predict(module, data_of(run.parent / "data"))
    return json.loads((run / "examples.json").read_text())


def generated(directory: Path, count: int, dtype: torch.dtype = torch.float32) -> list[str]:
    """Completions by transformers alone."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=dtype),
        AutoTokenizer.from_pretrained(directory),
    )
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
        texts.append(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    return texts


def test_every_model_completes_the_same_prompts(pico_dir, exports, tmp_path):
    run = tmp_path / "run"
    hook = GenerationExamples({name: str(path) for name, path in exports.items()})
    record = predict(run, hook, make_module(pico_dir, label="dense", max_new_tokens=8))
    assert [prompt["prompt"] for prompt in record["prompts"]] == list(PROMPTS)
    dense, one, two = record["models"]
    assert (dense["label"], one["label"], two["label"]) == ("dense", "one", "two")
    for column, directory in ((dense, pico_dir), (one, exports["one"]), (two, exports["two"])):
        assert column["completions"] == generated(directory, 8)
        assert column["source"] == str(directory)
        assert column["num_parameters"] == count_parameters(AutoModelForCausalLM.from_pretrained(directory))
    assert len({tuple(column["completions"]) for column in record["models"]}) == 3
    assert [column["plan_sha256"] for column in record["models"]] == [
        None,
        *(Plan.load(path / "plan.json").sha256 for path in exports.values()),
    ]
    assert record["protocol"] == {
        "max_new_tokens": 8,
        "dtype": "float32",
        "precision": "32-true",
        "decoding": "greedy",
    }
    predictions = json.loads((run / "predictions.json").read_text())
    assert dense["completions"] == [row["completion"] for row in predictions]
    table = [line for line in (run / "examples.md").read_text().splitlines() if line.startswith("|")]
    assert table[0] == "| Prompt | dense | one | two |"
    assert table[3].startswith("| Describe the &#124; function | ")
    assert {line.count("|") for line in table} == {5}


def test_own_column_is_the_model_as_the_callbacks_above_compressed_it(pico_dir, exports, tmp_path):
    record = predict(tmp_path / "mine", GenerationExamples(), make_module(pico_dir, max_new_tokens=6), Drop([0, 3]))
    (own,) = record["models"]
    assert own["label"] == "mine"  # the run directory's name
    assert own["completions"] == generated(exports["two"], 6)
    assert own["plan_sha256"] == Plan.load(tmp_path / "mine" / "plan.json").sha256
    assert own["num_parameters"] == count_parameters(AutoModelForCausalLM.from_pretrained(exports["two"]))


def test_adapters_of_a_checkpoint_are_not_counted_but_complete(pico_dir, tmp_path):
    data = data_of(tmp_path / "data")
    trainer = make_trainer(tmp_path / "fit")
    trainer.fit(make_module(pico_dir, learning_rate=0.3), data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer = make_trainer(tmp_path / "run", GenerationExamples({"dense": str(pico_dir)}))
    module = make_module(pico_dir, max_new_tokens=6)
    trainer.predict(module, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert module.adapted
    own, dense = json.loads((tmp_path / "run" / "examples.json").read_text())["models"]
    assert own["num_parameters"] == dense["num_parameters"]
    assert own["completions"] != dense["completions"] == generated(pico_dir, 6)


@pytest.mark.parametrize(
    ("options", "trainer", "dtype"),
    [
        ({"dtype": "bfloat16"}, {}, torch.bfloat16),
        ({}, {"precision": "bf16-true"}, torch.bfloat16),
        ({}, {"precision": "bf16-mixed"}, torch.float32),
    ],
)
def test_others_run_in_the_precision_of_the_run(pico_dir, exports, tmp_path, options, trainer, dtype, monkeypatch):
    seen = []
    load = loading.load_model

    def spy(*arguments: object):
        model = load(*arguments)
        # In mixed precision, linear maps of float32 weights give bfloat16.
        model.lm_head.register_forward_hook(lambda module, _, out: seen.append((module.weight.dtype, out.dtype)))
        return model

    monkeypatch.setattr(loading, "load_model", spy)
    hook = GenerationExamples({"same": str(pico_dir), "one": str(exports["one"])})
    record = predict(tmp_path / "run", hook, make_module(pico_dir, max_new_tokens=3, **options), **trainer)
    assert record["protocol"]["dtype"] == str(dtype).removeprefix("torch.")
    assert set(seen) == {(dtype, torch.bfloat16)}
    assert record["models"][0]["completions"] == record["models"][1]["completions"]


def test_one_model_is_freed_before_the_next_is_loaded(pico_dir, exports, tmp_path, monkeypatch):
    loaded: list[weakref.ref] = []
    alive = []
    load = loading.load_model

    def spy(*arguments: object):
        alive.append(sum(model() is not None for model in loaded))
        model = load(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load_model", spy)
    gc.disable()  # not at the collector's leisure
    try:
        models = {"again": str(pico_dir), **{name: str(path) for name, path in exports.items()}}
        predict(tmp_path / "run", GenerationExamples(models), make_module(pico_dir, max_new_tokens=1))
    finally:
        gc.enable()
    assert alive == [0, 1, 1, 1]  # the run's own stays


@pytest.mark.parametrize("compresses", [False, True])
@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"good": "", "lost": "/no/such/export"}, "cannot use the model 'lost': There is no directory /no/such/export"),
        ({"lost": "runs/nowhere"}, "cannot use the model 'lost': .*'runs/nowhere' could not be fetched"),
        ({"mine": ""}, "label 'mine', which is the run's own"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_any_work(pico_dir, exports, tmp_path, models, message, compresses):
    hook = GenerationExamples({label: path or str(exports["one"]) for label, path in models.items()})
    module, search = make_module(pico_dir, label="mine", max_new_tokens=1), Drop([1])
    trainer = make_trainer(tmp_path / "run", *([search] if compresses else []), hook)
    with pytest.raises(UsageError, match=message):
        trainer.predict(module, data_of(tmp_path / "data"))
    assert (search.searches, module.predictions) == (0, [])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("models", "message"), [({"a": "x", "a ": "y"}, "two models with the label 'a'"), ({" ": "x"}, "empty label")]
)
def test_impossible_labels(models, message):
    with pytest.raises(UsageError, match=message):
        GenerationExamples(models)


@pytest.mark.parametrize("stage", ["fit", "test", "prune"])
def test_other_stages_do_not_even_look_for_the_models(pico_dir, tmp_path, stage):
    trainer = make_trainer(tmp_path / "run", Drop([1]), GenerationExamples({"lost": "/no/such/export"}))
    module = make_module(pico_dir)
    getattr(trainer, stage)(module, datamodule=alpaca_data(tmp_path / "data"))
    assert len(module.plans) == 1
    assert not list((tmp_path / "run").glob("examples.*"))


def test_code_of_a_checkpoint_runs_only_if_the_run_trusts_it(pico_dir, exports, tmp_path, monkeypatch):
    seen = []
    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda source, *rest: seen.append(source) or load(source, *rest))
    for trusts in (False, True):
        said = pytest.warns(UserWarning, match="trust_remote_code is on") if trusts else contextlib.nullcontext()
        with said:
            module = make_module(pico_dir, max_new_tokens=1, trust_remote_code=trusts)
            predict(tmp_path / str(trusts), GenerationExamples({"one": str(exports["one"])}), module)
    assert [source.trust_remote_code for source in seen] == [False, False, True, True]


def test_quickstart_compares_what_the_quickstart_exports(exports, pico_dir, tmp_path, monkeypatch):
    """The shipped configuration as it stands, but for the models and the place."""
    monkeypatch.chdir(ROOT)
    path = "configs/quickstart_examples.yaml"
    shipped = yaml.safe_load(Path(path).read_text())
    quickstart = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    export = next(c for c in quickstart["trainer"]["callbacks"] if c["class_path"] == "callbacks.ExportCheckpoint")
    assert shipped["trainer"]["callbacks"][0]["init_args"]["models"] == {
        "pruned": export["init_args"]["compressed_dir"],
        "recovered": export["init_args"]["output_dir"],
    }
    models = json.dumps({"pruned": str(exports["one"]), "recovered": str(exports["two"])})
    place = ["--model.pretrained", str(pico_dir), "--trainer.default_root_dir", str(tmp_path)]
    main(["predict", "--config", path, *place, "--trainer.callbacks.models", models])
    record = json.loads((tmp_path / "examples.json").read_text())
    assert [model["label"] for model in record["models"]] == ["dense", "pruned", "recovered"]
    assert len(record["prompts"]) == 4
    assert all(prompt["instruction"] in prompt["prompt"] for prompt in record["prompts"])
    assert record["protocol"]["max_new_tokens"] == 48
