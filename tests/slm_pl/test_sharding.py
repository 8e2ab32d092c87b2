"""DeepSpeed's ZeRO stages between two real CPU processes."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from slm_pl import loading
from slm_pl.compression import surgery
from slm_pl.compression.plan import Base, KeepChannels, Method, Plan
from slm_pl.errors import UsageError
from slm_pl.export import load_compressed, save_compressed
from slm_pl.memory import TensorBytes
from slm_pl.sharding import is_sharded, load_sharded, load_trained, merged_on_first_rank, whole_parameters
from tests.helpers.pico import pico_model
from tests.helpers.ranks import under_torchrun
from tests.helpers.run import IDS, logits_of
from tests.helpers.tokenizer import pico_tokenizer

pytest.importorskip("deepspeed", reason="DeepSpeed is an optional dependency")
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]

TOKENS = IDS % 128
SMALL = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
"""A vocabulary so small that no tensor is a large part of the model."""
KINDS = ("plain", "tied", "files", "half", "gemma3_text", "bloom", "widths")
TIED = ("tied", "gemma3_text", "bloom", "widths")
ZERO_3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


class OwnBytes(TensorBytes):
    """As its parent, without a model's parts in this process, and without the meta device, which needs no memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.leave_out(p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves(result)):
            return result
        return super().__torch_dispatch__(lambda *_, **__: result, types)


def make_model(kind: str, directory: Path) -> None:
    """Writes one of :data:`KINDS` as a Hugging Face directory."""
    model_type = kind if kind in ("gemma3_text", "bloom") else "llama"
    model = pico_model(model_type, **SMALL, tie_word_embeddings=kind in TIED)
    if kind == "half":
        model = model.bfloat16()
    if kind == "widths":
        steps = (
            KeepChannels(1, "attention", (1,), "layers.1.attention.bias"),
            KeepChannels(4, "mlp", (2, 3, 47)),
            KeepChannels(5, "attention", ()),
        )
        plan = Plan(Base.of(model), Method("callbacks.FLAP", {}), None, steps)
        plan = plan.with_tensors({"layers.1.attention.bias": torch.linspace(-1, 1, 32)})
        surgery.apply(model, plan)
        save_compressed(model, pico_tokenizer(), directory, [plan], recovered=False)
        return
    model.save_pretrained(directory, max_shard_size="60KB" if kind == "files" else "1GB")
    assert (directory / "model.safetensors.index.json").is_file() == (kind == "files")
    pico_tokenizer().save_pretrained(directory)


REFUSED = {
    "missing": "lacks 1 of the weights that its config asks for, such as model.norm.weight",
    "shape": "model.norm.weight of {} has the shape [31]; its config asks for [32]",
    "layers": "asks for 6 decoder layers, and its weights hold more, such as model.layers.6.mlp.x",
    "experts": "Use stage 2",
    "broken": "cannot be loaded: SafetensorError",
    "absent": "cannot be loaded: FileNotFoundError",
}


def make_refused(directory: Path) -> None:
    """Writes a checkpoint for each of :data:`REFUSED`, with that fault."""
    for kind in REFUSED:
        pico_model("mixtral" if kind == "experts" else "llama", **SMALL).save_pretrained(directory / kind)
        file = directory / kind / "model.safetensors"
        weights = load_file(file)
        norm = weights.pop("model.norm.weight", None)
        if kind == "shape":
            weights["model.norm.weight"] = norm[1:].clone()
        if kind in ("missing", "shape"):
            save_file(weights, file, {"format": "pt"})
        if kind == "layers":
            save_file({**weights, "model.norm.weight": norm, "model.layers.6.mlp.x": norm.clone()}, file)
        if kind == "broken":
            file.write_bytes(file.read_bytes()[:1000])
        if kind == "absent":
            file.unlink()


def _load(rank: int, directory: str) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    for kind in KINDS:
        with deepspeed.zero.Init(config_dict_or_path=ZERO_3), OwnBytes(torch.nn.Module()) as counted:
            model = load_sharded(loading.resolve(f"{directory}/{kind}"))
        parameters = list(model.parameters())
        assert all(hasattr(p, "ds_id") for p in parameters)
        with deepspeed.zero.GatheredParameters(parameters):
            found = {
                "logits": logits_of(model, TOKENS),
                "state": {name: value.clone() for name, value in model.state_dict().items()},
                "buffers": dict(model.named_buffers()),
                "peak": counted.peak / sum(p.nbytes for p in parameters),
                "eos": model.generation_config.eos_token_id,
                "name": model.config._name_or_path,
            }
        torch.save(found, f"{directory}/{kind}.{rank}.pt")
    for kind in REFUSED:
        linear = torch.nn.Linear.__init__
        with pytest.raises(UsageError) as refusal, deepspeed.zero.Init(config_dict_or_path=ZERO_3):
            load_sharded(loading.resolve(f"{directory}/{kind}"))
        assert torch.nn.Linear.__init__ is linear
        Path(f"{directory}/{kind}.{rank}.txt").write_text(str(refusal.value))


def test_sharded_load(tmp_path):
    make_refused(tmp_path)
    for kind in KINDS:
        make_model(kind, tmp_path / kind)
    under_torchrun(_load, tmp_path)
    for kind in KINDS:
        if kind == "widths":
            model = load_compressed(tmp_path / kind)[0]
        else:
            model = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype="auto")
        assert model.dtype == (torch.bfloat16 if kind == "half" else torch.float32)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{kind}.{rank}.pt")
            torch.testing.assert_close(found["state"], dict(model.state_dict()), rtol=0, atol=0)
            torch.testing.assert_close(found["buffers"], dict(model.named_buffers()), rtol=0, atol=0)
            torch.testing.assert_close(found["logits"], logits_of(model, TOKENS), rtol=0, atol=0)
            assert 0.5 <= found["peak"] < 0.75, (kind, rank, found["peak"])
            assert found["eos"] == 1
            assert found["name"] == str(tmp_path / kind)
    for kind, message in REFUSED.items():
        refusals = [(tmp_path / f"{kind}.{rank}.txt").read_text() for rank in (0, 1)]
        assert message.format(tmp_path / kind) in refusals[0] == refusals[1]


FROM_WHOLE = "stage_3_from_whole"
"""The run that gives DeepSpeed a model which every process has whole, as where callbacks compress it."""


class Recovery(pl.LightningModule):
    """Trains adapters on a fixed batch with a large step, and looks at its weights on the way.

    Args:
        directory: Of the model; what is found is written beside it.
        name: Of what is found.
        lora: Arguments of PEFT's ``LoraConfig``; null trains all weights.
    """

    def __init__(self, directory: str, name: str, lora: dict[str, object] | None) -> None:
        super().__init__()
        self.strict_loading = False
        self.directory, self.name, self.lora = Path(directory), name, lora
        self.model: torch.nn.Module | None = None

    def setup(self, stage: str) -> None:
        if not is_sharded(self.trainer.strategy) or self.name == FROM_WHOLE:
            self.model = loading.load_model(loading.resolve(str(self.directory / "model")))
            self.adapt()

    def configure_model(self) -> None:
        if self.model is None:
            self.model = load_sharded(loading.resolve(str(self.directory / "model")))
            with whole_parameters():
                self.adapt()

    def adapt(self) -> None:
        if self.lora is not None:
            config = LoraConfig(task_type="CAUSAL_LM", **self.lora)
            full = self.trainer.precision == "32-true"
            self.model = get_peft_model(self.model, config, autocast_adapter_dtype=full)

    def on_train_start(self) -> None:
        self.keep("start")

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def on_train_batch_end(self, outputs: object, batch: torch.Tensor, batch_idx: int) -> None:
        if batch_idx == 1:
            self.keep("best")
            self.trainer.save_checkpoint(self.directory / f"{self.name}.ckpt")

    def on_train_end(self) -> None:
        self.keep("last")
        load_trained(self.trainer.strategy, self.directory / f"{self.name}.ckpt")
        self.keep("loaded")
        if is_sharded(self.trainer.strategy):
            with OwnBytes(self) as counted:
                merged = merged_on_first_rank(self.model, self.trainer.strategy)
            self.keep("after")
            assert (merged is not None) == self.trainer.is_global_zero
            torch.save(counted.peak, self.directory / f"{self.name}.peak.{self.global_rank}.pt")
            if merged is not None:
                torch.save(merged.state_dict(), self.directory / f"{self.name}.merged.pt")
                _, tokenizer, plans = load_compressed(self.directory / "model")
                save_compressed(merged, tokenizer, self.directory / self.name, plans, recovered=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-2)

    def keep(self, when: str) -> None:
        """Writes all weights, whole."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        torch.save(weights, self.directory / f"{self.name}.{when}.{self.global_rank}.pt")


RUNS: dict[str, tuple[int, str, dict[str, object] | None]] = {
    "stage_1": (1, "32-true", {}),
    "stage_2": (2, "32-true", {}),
    "stage_3": (3, "32-true", {}),
    "stage_2_half": (2, "bf16-true", {}),
    "stage_3_half": (3, "bf16-true", {}),
    "stage_3_rslora": (3, "32-true", {"use_rslora": True, "alpha_pattern": {"q_proj": 2}}),
    "stage_3_all_weights": (3, "32-true", None),
    FROM_WHOLE: (3, "32-true", {}),
}
"""Stage, precision and settings of the adapters."""
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


def _train(rank: int, directory: str) -> None:
    from tests.helpers.deepspeed import CPUDeepSpeedStrategy

    for name, (stage, precision, lora) in RUNS.items():
        pl.seed_everything(0, verbose=False)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=CPUDeepSpeedStrategy(stage=stage, exclude_frozen_parameters=True),
            precision=precision,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Recovery(directory, name, None if lora is None else {**LORA, **lora})
        trainer.fit(module, DataLoader(list(TOKENS.repeat(4, 1)), batch_size=1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What :data:`RUNS` left behind."""
    directory = tmp_path_factory.mktemp("trained")
    make_model("widths", directory / "model")
    under_torchrun(_train, directory)
    return directory


def weights_of(directory: Path, name: str, when: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(directory / f"{name}.{when}.{rank}.pt")


@pytest.mark.parametrize("name", RUNS)
def test_best_weights_are_loaded_again(name, trained):
    start, best, last, loaded = (weights_of(trained, name, when) for when in ("start", "best", "last", "loaded"))
    moved = {key for key in start if not torch.equal(start[key], best[key])}
    assert moved == {key for key in best if not torch.equal(best[key], last[key])}
    assert moved >= {key for key in start if "lora_" in key or RUNS[name][2] is None and start[key].numel()}
    if RUNS[name][2] is not None:
        assert all("lora_" in key for key in moved)
        assert all((value == 0).all() for key, value in start.items() if "lora_B" in key)
    torch.testing.assert_close(loaded, best, rtol=0, atol=0)
    torch.testing.assert_close(weights_of(trained, name, "loaded", rank=1), loaded, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("stage_3")])
def test_merged_on_first_rank(name, trained):
    weights = weights_of(trained, name, "loaded")
    torch.testing.assert_close(weights_of(trained, name, "after"), weights, rtol=0, atol=0)
    expected = load_compressed(trained / "model")[0]
    with torch.no_grad():
        for key, p in expected.named_parameters():
            if RUNS[name][2] is None:
                p.copy_(weights[key])
                continue
            path, _, last = f"base_model.model.{key}".rpartition(".")
            a, b = (weights.get(f"{path}.lora_{part}.default.weight") for part in "AB")
            if a is not None:
                alpha = 2 if "rslora" in name and "q_proj" in key else 8
                scale = alpha / (2 if "rslora" in name else 4)
                total = weights[f"{path}.base_layer.{last}"].double() + scale * b.double() @ a.double()
                p.copy_(total)
            else:
                p.copy_(weights.get(f"{path}.base_layer.{last}", weights.get(f"{path}.{last}")))
    half = name.endswith("half")
    for p in expected.parameters():  # the rotary frequencies stay float32
        p.data = p.to(torch.bfloat16 if half else torch.float32)
    merged = torch.load(trained / f"{name}.merged.pt")
    torch.testing.assert_close(merged, dict(expected.state_dict()), rtol=0, atol=0 if half else 1e-6)
    assert merged["lm_head.weight"].data_ptr() == merged["model.embed_tokens.weight"].data_ptr()
    stock = AutoModelForCausalLM.from_pretrained(trained / name, dtype="auto", trust_remote_code=True)
    assert stock.dtype == expected.dtype
    torch.testing.assert_close(dict(stock.state_dict()), merged, rtol=0, atol=0)
    torch.testing.assert_close(logits_of(stock, TOKENS), logits_of(expected, TOKENS), rtol=0, atol=0 if half else 1e-5)
    peaks = [torch.load(trained / f"{name}.peak.{rank}.pt") for rank in (0, 1)]
    sizes = [p.nbytes for p in expected.parameters()]
    adapters = sum(value.nbytes for key, value in weights.items() if "lora_" in key)
    # Beside the copy, of one module at a time: the parts, the whole, and the sum in float32.
    assert sum(sizes) <= peaks[0] <= sum(sizes) + adapters + 3 * max(sizes) < 1.5 * sum(sizes)
    assert peaks[1] <= 2 * max(sizes) < 0.2 * sum(sizes)
