"""int8 by torchao and other dtypes, as switches of loading and of exporting."""

import json
import logging
import re
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from slm_pl import loading
from slm_pl.cli import quieten
from slm_pl.compression import feasibility, surgery
from slm_pl.compression.plan import Base, DropLayers, KeepChannels, Method, Plan, count_parameters
from slm_pl.errors import UsageError
from slm_pl.export import load_compressed, save_compressed
from slm_pl.loading import load_model, quantization_of, resolve
from slm_pl.quantization import INT8
from tests.helpers.pico import CONFIGS, pico_model
from tests.helpers.ranks import under_torchrun
from tests.helpers.run import Drop, alpaca_data, logits_of, make_module, make_trainer
from tests.helpers.tokenizer import pico_tokenizer
from tests.slm_pl.test_export import compressed, narrowed

pytest.importorskip("torchao", reason="torchao is an optional dependency")
pytestmark = pytest.mark.usefixtures("one_thread")


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent of torchao: int8 numbers and one scale per row; 255 steps span twice the row's largest weight."""
    scale = (weight.detach().abs().max(dim=1, keepdim=True).values / 127.5).float()
    return (weight.detach().float() * (1 / scale)).round().clamp(-128, 127), scale


@torch.no_grad()
def by_hand(model: torch.nn.Module) -> torch.nn.Module:
    """Replaces the weights of the linear maps by what int8 makes of them; the head stays. Changes the model."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and module.weight.numel():
            q, scale = rounded(module.weight)
            module.weight.copy_(q * scale)
    return model


def quantised_names(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if hasattr(p, "qdata")}


def saved(model: torch.nn.Module, directory: Path) -> Path:
    model.save_pretrained(directory)
    pico_tokenizer().save_pretrained(directory)
    return directory


def size(directory: Path) -> int:
    return (directory / "model.safetensors").stat().st_size


def content(directory: Path) -> int:
    """Bytes of all tensors, without the file's header, which is most of a pico model."""
    return sum(t.numel() * t.element_size() for t in load_file(directory / "model.safetensors").values())


@pytest.mark.parametrize("tied", [False, True])
def test_int8_is_of_linear_maps_and_leaves_the_head_alone(tied, tmp_path):
    model = pico_model(tie_word_embeddings=tied)
    directory = saved(model, tmp_path / "model")
    loaded = load_model(resolve(str(directory)), quantization="int8")
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert quantised_names(loaded) == linear - {"lm_head.weight"}
    assert len(quantised_names(loaded)) == 7 * 6
    own = dict(model.named_parameters())
    for name, p in loaded.named_parameters():
        if name in quantised_names(loaded):
            q, scale = rounded(own[name])
            assert (p.qdata.dtype, p.scale.dtype, p.dtype) == (torch.int8, torch.float32, torch.float32)
            assert torch.equal(p.qdata.float(), q)
            assert torch.equal(p.scale, scale)
            assert ((q * scale - own[name]).abs() <= 0.5001 * scale).all()  # to the nearest
            assert q.abs().max(dim=1).values.min() >= 127  # in every row
        else:
            assert torch.equal(p, own[name])
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert count_parameters(loaded) == count_parameters(model)
    dense = logits_of(model)
    torch.testing.assert_close(logits_of(loaded), logits_of(by_hand(model)), rtol=0, atol=1e-5)
    assert 1e-3 < (logits_of(loaded) - dense).abs().max() < 0.1 * dense.abs().max()
    assert quantization_of(loaded.config) == INT8
    assert not loaded.training


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_goes_round(model_type, tmp_path):
    model = pico_model(model_type, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    plain = save_compressed(model, pico_tokenizer(), tmp_path / "plain", [], recovered=False)
    path = save_compressed(model, pico_tokenizer(), tmp_path / "int8", [], recovered=False, quantization="int8")
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    attention = model.config._attn_implementation
    quantised = load_model(resolve(str(plain)), "auto", attention, "int8")
    stock, report = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits_of(stock), logits_of(quantised))
    assert count_parameters(stock) == count_parameters(model)
    assert quantised_names(stock) == quantised_names(quantised)
    heads = [name for name, p in stock.named_parameters() if p is stock.get_output_embeddings().weight]
    assert not quantised_names(stock) & set(heads)


@pytest.mark.parametrize("kind", ["depth", "width", "emptied"])
def test_compressed_models_go_round_and_stay_as_they_are(kind, tmp_path):
    emptied = (KeepChannels(5, "attention", ()), KeepChannels(3, "mlp", ())) if kind == "emptied" else ()
    model, plans = compressed() if kind == "depth" else narrowed("llama", *emptied)
    plain = save_compressed(model, pico_tokenizer(), tmp_path / "plain", plans, recovered=False)
    before, config = {n: p.clone() for n, p in model.state_dict().items()}, model.config.to_dict()
    parameters = list(model.parameters())
    path = save_compressed(model, pico_tokenizer(), tmp_path / "int8", plans, recovered=False, quantization="int8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int8", "plain"]  # nothing is left beside them

    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert model.config.to_dict() == config
    assert quantization_of(model.config) is None
    assert size(path) < size(plain)
    weights = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    weights = [weight for weight in weights if weight.numel()]
    # One byte for four; for every row four bytes of the scale and at most one of a zero.
    less = [sum(3 * weight.numel() - row * len(weight) for weight in weights) for row in (4, 5)]
    assert content(plain) - content(path) in less
    quantised = load_model(resolve(str(plain)), quantization="int8")
    loaded, tokenizer, loaded_plans = load_compressed(path)
    theirs = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=kind != "depth")
    for one in (loaded, theirs):
        assert torch.equal(logits_of(one), logits_of(quantised))
        assert count_parameters(one) == count_parameters(model)
    torch.testing.assert_close(logits_of(loaded), logits_of(by_hand(model)), rtol=0, atol=1e-5)
    assert "lm_head.weight" not in quantised_names(loaded)
    assert loaded_plans == plans
    assert tokenizer.eos_token_id == loaded.generation_config.eos_token_id == 1
    greedy = [m.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False) for m in (loaded, quantised)]
    assert torch.equal(*greedy)


def test_int8_after_bfloat16(tmp_path):
    model, plans = compressed()
    path = save_compressed(
        model, pico_tokenizer(), tmp_path / "export", plans, False, dtype="bfloat16", quantization="int8"
    )
    config = json.loads((path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    stock = AutoModelForCausalLM.from_pretrained(path)
    assert stock.dtype == stock.model.norm.weight.dtype == torch.bfloat16
    original = model.model.layers[0].mlp.up_proj.weight
    q, scale = rounded(original.bfloat16())
    # Where the largest weight lies between two numbers, the version of torchao decides.
    assert (stock.model.layers[0].mlp.up_proj.weight.qdata - q).abs().max() <= 1
    torch.testing.assert_close(logits_of(stock).float(), logits_of(by_hand(model)), rtol=0, atol=0.02)
    stored = load_file(path / "model.safetensors")
    assert all(t.numel() <= 48 for t in stored.values() if t.dtype == torch.float32)  # scales
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_bfloat16_is_of_weights_and_config(tmp_path):
    model, plans = narrowed()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", plans, recovered=True, dtype="bfloat16")
    config = json.loads((path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    stored = load_file(path / "model.safetensors")
    assert set(stored) == set(before)
    assert all(torch.equal(t, before[name].bfloat16()) for name, t in stored.items())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert model.dtype == torch.float32
    loaded = load_compressed(path)[0]
    assert loaded.dtype == torch.bfloat16
    plain = save_compressed(model, pico_tokenizer(), tmp_path / "plain", plans, recovered=True)
    assert torch.equal(logits_of(loaded), logits_of(load_model(resolve(str(plain)), "bfloat16")))
    card = (path / "README.md").read_text()
    assert "Its weights are in bfloat16." in card
    assert "torchao" not in card
    assert "Recovered by training" in card


def test_own_dtype_by_name_is_written_as_it_is(tmp_path, monkeypatch):
    model, plans = compressed()
    monkeypatch.setattr("slm_pl.export.load_model", lambda *a: pytest.fail("nothing had to be loaded"))
    for dtype in ("auto", "float32"):
        path = save_compressed(model, pico_tokenizer(), tmp_path / dtype, plans, recovered=False, dtype=dtype)
        assert load_file(path / "model.safetensors")["model.norm.weight"].dtype == torch.float32
        assert "Its weights are in float32." in (path / "README.md").read_text()


@pytest.mark.parametrize("unequal", [False, True], ids=["depth", "width"])
def test_the_card_says_it_and_shows_the_lines_that_load_it(unequal, tmp_path, monkeypatch):
    model, plans = narrowed() if unequal else compressed()
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", plans, False, quantization="int8")
    card = (path / "README.md").read_text()
    assert f"Its weights are quantised: {INT8}." in card
    assert "is in float32, which it computes in. Loading it takes `pip install torchao`." in card
    assert "Made from `some/model`" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    assert "# needs torchao: pip install torchao\n" in code.group(1)
    monkeypatch.chdir(path)
    names: dict[str, torch.nn.Module] = {}
    exec(code.group(1), names)
    assert torch.equal(logits_of(names["model"]), logits_of(load_compressed(".")[0]))
    # Where it was written first is told nowhere.
    for file in path.glob("*.[jmp][sdy]*"):
        assert not re.search(rf"{tmp_path}|/\.export\.", file.read_text()), file


def test_card_of_a_dense_model_names_it(tmp_path):
    model = pico_model()
    model.config._name_or_path = "some/model"
    path = save_compressed(model, pico_tokenizer(), tmp_path / "export", [], recovered=False, quantization="int8")
    assert "`some/model`, " in (path / "README.md").read_text()
    assert model.config._name_or_path == "some/model"


def test_error_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(source, *arguments):
        assert (Path(source.location) / "model.safetensors").is_file()
        assert len(list((tmp_path / "runs").iterdir())) == 2
        raise RuntimeError("boom")

    monkeypatch.setattr("slm_pl.export.load_model", fail)
    model, plans = compressed()
    with pytest.raises(RuntimeError, match="boom"):
        save_compressed(model, pico_tokenizer(), tmp_path / "runs" / "export", plans, False, quantization="int8")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.fixture(scope="module")
def int8_dir(tmp_path_factory) -> Path:
    """The pico model of six layers, as int8."""
    path = tmp_path_factory.mktemp("int8") / "model"
    model = pico_model(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return save_compressed(model, pico_tokenizer(), path, [], recovered=False, quantization="int8")


def test_int8_checkpoint_needs_no_switch_and_takes_it(int8_dir, pico_dir):
    expected = logits_of(load_model(resolve(str(pico_dir)), quantization="int8"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="You passed `quantization_config`")
        for asked in (None, "int8"):
            loaded = load_model(resolve(str(int8_dir)), quantization=asked)
            assert torch.equal(logits_of(loaded), expected)
    # The dtype is that of the rest, and of what comes out.
    other = load_model(resolve(str(int8_dir)), "bfloat16")
    assert logits_of(other).dtype == torch.bfloat16
    torch.testing.assert_close(logits_of(other).float(), expected, rtol=0, atol=0.03)


def quantised_by(name: str, directory: Path, pico_dir: Path, **entries: object) -> str:
    """A checkpoint whose config says that something else has quantised it."""
    saved(pico_model(), directory)
    path = directory / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": name, **entries}})
    )
    return str(directory)


def test_another_quantisation_is_refused(pico_dir, tmp_path):
    directory = quantised_by("gptq", tmp_path / "gptq", pico_dir, bits=4)
    with pytest.raises(UsageError, match=f"{directory} is quantised already .gptq.; .*Leave it out, or give"):
        load_model(resolve(directory), quantization="int8")


def test_names_of_quantisations():
    def of(**entries: object) -> str | None:
        return quantization_of(LlamaConfig(quantization_config=entries))

    def ao(kind: str, **data: object) -> dict[str, object]:
        return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_data": data, "_version": 2}}}

    assert quantization_of(LlamaConfig()) is None
    assert of(quant_method="gptq", bits=4) == "gptq"
    assert of(load_in_8bit=True) == "bitsandbytes"
    assert of(**ao("Int8WeightOnlyConfig", granularity={"_type": "PerRow", "_data": {"dim": -1}})) == INT8
    assert of(**ao("Int8WeightOnlyConfig")) == INT8
    assert of(**ao("Int8WeightOnlyConfig", group_size=32)) == "torchao"
    assert of(**ao("Int8WeightOnlyConfig", granularity={"_type": "PerTensor"})) == "torchao"
    assert of(**ao("Int4WeightOnlyConfig")) == "torchao"
    assert loading.quantization_of is quantization_of


def test_quantised_weights_are_not_compressed(int8_dir):
    model = load_model(resolve(str(int8_dir)))
    plan = Plan(Base.of(model), Method("x", {}), None, (DropLayers((1,)),))
    for work in (feasibility.check, surgery.apply):
        with pytest.raises(UsageError, match="are quantised .int8 .*cannot be cut or merged. Start from .*Export"):
            work(model, plan)
    assert len(model.model.layers) == 6


def test_quantised_weights_are_not_exported_again(int8_dir, tmp_path):
    model = load_model(resolve(str(int8_dir)))
    for options in ({}, {"quantization": "int8"}, {"dtype": "bfloat16"}):
        with pytest.raises(UsageError, match="are quantised .* and cannot be exported .*Start from"):
            save_compressed(model, pico_tokenizer(), tmp_path / "export", [], recovered=False, **options)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("by_switch", [False, True], ids=["checkpoint", "switch"])
@pytest.mark.parametrize("stage", ["fit", "test", "prune"])
def test_quantised_weights_are_refused_before_the_search(stage, by_switch, int8_dir, pico_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *a: pytest.fail("loaded"))
    method = Drop([1])
    options = {"quantization": "int8"} if by_switch else {}
    module = make_module(pico_dir if by_switch else int8_dir, **options)
    trainer = make_trainer(tmp_path / "run", method)
    with pytest.raises(UsageError, match="are quantised .int8 weight-only .torchao.. and cannot be .*Start from"):
        getattr(trainer, stage)(module, datamodule=alpaca_data(tmp_path))
    assert method.searches == 0
    assert not (tmp_path / "run" / "plan.json").exists()


@pytest.mark.parametrize("by_switch", [False, True], ids=["checkpoint", "switch"])
def test_quantised_weights_are_not_trained(by_switch, int8_dir, pico_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *a: pytest.fail("loaded"))
    options = {"quantization": "int8"} if by_switch else {}
    for more in ({}, {"lora": None}):
        module = make_module(pico_dir if by_switch else int8_dir, **options, **more)
        with pytest.raises(UsageError, match="cannot be trained. Start from the model as it was"):
            make_trainer(tmp_path / "run").fit(module, datamodule=alpaca_data(tmp_path))


def test_quantised_weights_take_no_checkpoint(pico_dir, tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.fit(make_module(pico_dir), datamodule=alpaca_data(tmp_path))
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    module = make_module(pico_dir, quantization="int8")
    with pytest.raises(UsageError, match="cannot be replaced by those of a checkpoint"):
        make_trainer(tmp_path / "other").test(module, alpaca_data(tmp_path), str(tmp_path / "trained.ckpt"))


@pytest.mark.parametrize("stage", ["validate", "predict"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_other_stages_use_them(stage, precision, int8_dir, tmp_path):
    module = make_module(int8_dir, max_new_tokens=2)
    trainer = make_trainer(tmp_path / "run", precision=precision, limit_val_batches=1)
    getattr(trainer, stage)(module, datamodule=alpaca_data(tmp_path))
    if stage == "validate":
        assert trainer.callback_metrics["val/loss"] > 1
    else:
        assert len(module.predictions) > 1
    assert len(quantised_names(module.load_model())) == 42


@pytest.mark.parametrize("asked", [None, "int8"])
def test_without_torchao_the_fix_is_named(asked, int8_dir, pico_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    directory = int8_dir if asked is None else pico_dir
    what = f"{directory}, whose weights are quantised with it," if asked is None else "quantization int8"
    with pytest.raises(UsageError, match=rf"^{what} needs torchao .*pip install -e '.\[quantization\]'$"):
        load_model(resolve(str(directory)), quantization=asked)
    load_model(resolve(str(pico_dir)))  # others do not need it


def test_export_without_torchao_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    model, plans = compressed()
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UsageError, match="quantization int8 needs torchao"):
        save_compressed(model, pico_tokenizer(), tmp_path / "runs" / "export", plans, False, quantization="int8")
    assert not (tmp_path / "runs").exists()


def test_settings_of_the_process_stay(int8_dir, pico_dir, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config, "coordinate_descent_tuning", False)
    monkeypatch.setattr(config, "force_fuse_int_mm_with_mul", False)
    load_model(resolve(str(int8_dir)))
    load_model(resolve(str(pico_dir)), quantization="int8")
    assert not config.coordinate_descent_tuning
    assert not config.force_fuse_int_mm_with_mul
    assert torch.get_float32_matmul_precision() == "highest"


def test_deepspeed_does_not_measure_them(pico_dir, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is an optional dependency")
    from tests.helpers.deepspeed import CPUDeepSpeedStrategy

    # Not through the trainer: DeepSpeed would leave its processes' group and environment to the tests that follow.
    module = make_module(pico_dir, quantization="int8")
    module.trainer = make_trainer(tmp_path / "run", strategy=CPUDeepSpeedStrategy(stage=2))
    with pytest.raises(UsageError, match="are quantised, and DeepSpeed is for training. Measure with"):
        module.setup("validate")


def _validate(rank: int, directory: str, pretrained: str) -> None:
    run = Path(directory)
    trainer = make_trainer(run, devices=2, strategy=DDPStrategy(process_group_backend="gloo"), limit_val_batches=1.0)
    trainer.validate(make_module(pretrained), alpaca_data(run / f"data{rank}"), verbose=False)
    if rank == 0:
        (run / "loss.json").write_text(json.dumps(trainer.callback_metrics["val/loss"].item()))


@pytest.mark.long
def test_two_processes_measure_together(int8_dir, tmp_path):
    (tmp_path / "two").mkdir()
    under_torchrun(partial(_validate, pretrained=str(int8_dir)), tmp_path / "two")
    trainer = make_trainer(tmp_path / "one", limit_val_batches=1.0)
    trainer.validate(make_module(int8_dir), alpaca_data(tmp_path / "data"), verbose=False)
    expected = trainer.callback_metrics["val/loss"].item()
    assert json.loads((tmp_path / "two" / "loss.json").read_text()) == pytest.approx(expected, rel=1e-5)


def test_only_what_nobody_can_act_on_is_dropped(caplog):
    for _ in range(2):
        quieten()
    ao, tree = (logging.getLogger(name) for name in ("torchao", "torch.utils._pytree"))
    assert len(ao.filters) == 1
    ao.warning("Failed to load /x/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so: Could not load this library: /x")
    tree.warning("%s is an Enum subclass and is now natively supported by torch.compile. Calling …", int)
    ao.warning("Skipping import of cpp extensions due to incompatible torch version")
    tree.warning("something else")
    assert [record.getMessage()[:8] for record in caplog.records] == ["Skipping", "somethin"]
