"""The LightningModule around a (compressed) causal language model."""

import dataclasses
import json
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from slm_pl import files, identity, loading, sharding
from slm_pl.compression.architecture import ARCHITECTURES, num_layers
from slm_pl.compression.plan import count_parameters, load_plans
from slm_pl.compression.streaming import check_dtype, check_streamed
from slm_pl.errors import UsageError
from slm_pl.evaluation.generation import complete
from slm_pl.journal import Journal
from slm_pl.quantization import INT8, compress_first, quantization_of
from slm_pl.recovery.adapters import LoRA, add_adapters, merge_adapters, say_trainable, train_last_layers
from slm_pl.recovery.distillation import Distillation
from slm_pl.recovery.teacher import Teacher
from slm_pl.recovery.training import RecoveryModule
from slm_pl.results import Environment, ModelIdentity, Results

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


class CausalLM(RecoveryModule):
    """A causal language model that is compressed, recovered and measured.

    Compression callbacks change the model before :meth:`setup` wraps it in LoRA. ``fit`` trains on the response tokens
    with AdamW and a linear warm-up and decay, as the published recovery recipe does (learning rate 1e-4, 100 warm-up
    steps, LoRA r 8, alpha 16). ``test`` measures nothing by itself: the hooks do, and this module writes their figures
    to ``results.json`` in the run directory.

    Args:
        pretrained: A Hub id, a directory, a ``.gguf`` file, or ``package:NAME/FILE.gguf``.
        revision: Commit, branch or tag of a Hub model.
        dtype: In which the weights are loaded; ``auto`` is the checkpoint's.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, …; null lets transformers choose.
        trust_remote_code: Run Python code that the checkpoint brings along. Off unless you have read that code.
        streaming: For ``prune`` of a model that is larger than memory: weights stay in their files and are read layer
            by layer (:mod:`slm_pl.compression.streaming`). Plan and export are the same.
        quantization: ``int8``: the weights of the linear maps as int8 with torchao, except those of the language-model
            head and of experts; for ``test``, ``validate`` and ``predict`` without compression. To compress, train and
            then quantise, give it to ``callbacks.ExportCheckpoint``. A checkpoint that is quantised needs no switch.
        lora: Adapter settings, or null to train all weights.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: AdamW's.
        warmup_steps: Optimizer steps of linear warm-up.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        last_layers: Train the last so many decoder layers and the language-model head instead of adapters
            (arXiv 2411.15558); needs ``lora: null``.
        distillation: Also learn from the dense model; null for the labels alone.
        label: Name in results and comparisons; null takes the run directory's name.
        max_new_tokens: Length of the completions that ``predict`` writes.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        dtype: loading.DType = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        streaming: bool = False,
        quantization: loading.Quantization | None = None,
        lora: LoRA | None = LoRA(),  # noqa: B008  frozen
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        gradient_checkpointing: bool = False,
        last_layers: int | None = None,
        distillation: Distillation | None = None,
        label: str | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        super().__init__(distillation, learning_rate, weight_decay, warmup_steps)
        if last_layers is not None and (lora is not None or last_layers < 0):
            raise UsageError(
                f"model.last_layers is {last_layers} and model.lora is {'null' if lora is None else 'set'}. Give a "
                "number of layers from 0 on with lora: null, or adapters with last_layers: null."
            )
        self.pretrained = pretrained
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.streaming = streaming
        self.quantization = quantization
        self.lora = lora
        self.gradient_checkpointing = gradient_checkpointing
        self.last_layers = last_layers
        self.label = label
        self.max_new_tokens = max_new_tokens
        self.source = loading.resolve(pretrained, revision, trust_remote_code)
        self.plans = [] if self.source.directory is None else load_plans(self.source.directory)
        self.dense_layers: list[int] | None = None  # their parameters, known once the dense model was compressed here
        self.results: Results | None = None
        self.journal: Journal | None = None
        self.predictions: list[dict[str, str]] = []
        self.model: PreTrainedModel | PeftModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = loading.load_tokenizer(self.source)
        return self._tokenizer

    def load_model(self) -> "PreTrainedModel":
        """The Hugging Face model, loaded on first use; compression callbacks work on it before LoRA wraps it."""
        if self.model is None:
            if self.streaming:
                check_dtype(loading.read_config(self.source), self.dtype_name)  # before anything large is read
            model = loading.load_model(self.source, self.dtype_name, self.attn_implementation, self.quantization)
            if self.streaming:
                check_streamed(model)
            self.model = model
        return cast("PreTrainedModel", self.model)

    def check_run(self, stage: str) -> None:
        """Refuses, before any work, a run that cannot be, or whose results would replace those of an earlier one.

        Raises:
            UsageError: If quantised weights would be changed, or if there are results in the run directory and
                ``--overwrite`` was not given.
        """
        pruning = bool(getattr(self.trainer, "pruning", False))
        if stage == "fit" or pruning:
            self.check_unquantised("exported again" if pruning else "trained")
        elif self.trainer.ckpt_path is not None:
            self.check_unquantised("replaced by those of a checkpoint")
        if self.streaming and not pruning:
            raise UsageError(
                f"model.streaming is for prune, and this is {getattr(stage, 'value', stage)}. Prune with it, then give "
                "the export as model.pretrained."
            )
        path = results_file(self.trainer)
        if stage == "test" and path.exists() and not may_overwrite(self.trainer):
            raise UsageError(
                f"{path} holds the results of an earlier test. Pass --overwrite to replace them, or another "
                "--trainer.default_root_dir."
            )

    def check_unquantised(self, work: str) -> None:
        """Refuses, before the model is loaded, to change weights that are quantised.

        Args:
            work: What cannot be done to them.

        Raises:
            UsageError: If they are, in the checkpoint or because ``quantization`` asks for it.
        """
        config = self.plain.config if self.model is not None else loading.read_config(self.source)
        found = quantization_of(config) or (self.quantization and INT8)
        if found:
            raise compress_first(self.pretrained, found, work)

    def setup(self, stage: str) -> None:
        """Chooses what is trained; without a checkpoint the other stages need no adapter."""
        self.check_run(stage)
        sharding.check_strategy(self.trainer.strategy, stage == "fit")
        if self.model is None and stage == "fit" and sharding.is_sharded(self.trainer.strategy):
            return  # nobody needed the whole model: every process loads its part, in `configure_model`
        model = self.load_model()
        if quantization_of(model.config) is not None:
            if isinstance(self.trainer.strategy, DeepSpeedStrategy):
                raise UsageError(
                    f"The weights of {self.pretrained} are quantised, and DeepSpeed is for training. Measure with "
                    "--trainer.strategy auto (or ddp)."
                )
            # Each process has read them by itself, and torch cannot send them to the others.
            self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_parameters()]
        if stage == "fit" or self.trainer.ckpt_path is not None:
            self._prepare_training()

    def configure_model(self) -> None:
        """Loads the model in parts where each process is to hold a part only; Lightning calls it ready to do so."""
        if self.model is None:
            self.model = sharding.load_sharded(self.source, self.dtype_name, self.attn_implementation)
            with sharding.whole_parameters():
                self._prepare_training()

    def _prepare_training(self) -> None:
        model = self.load_model()
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.last_layers is not None:
            train_last_layers(model, self.last_layers)
        elif self.lora is None:
            say_trainable(model, "Full fine-tuning")
        elif not self.adapted:
            if self.lora.dora and sharding.is_sharded(self.trainer.strategy):
                raise UsageError(
                    "model.lora.dora needs whole weights, and DeepSpeed's stage 3 spreads them over the processes. Use "
                    "stage 2, or plain LoRA."
                )
            # In 16 bit, small updates would be rounded away. DeepSpeed keeps a copy in float32 for its optimizer.
            deepspeed = isinstance(self.trainer.strategy, DeepSpeedStrategy)
            half = self.trainer.precision in ("bf16-true", "16-true")
            self.model = add_adapters(model, self.lora, float32=not (deepspeed and half))
        assert self.model is not None
        self.model.train()  # from_pretrained gives it in eval mode

    @property
    def adapted(self) -> bool:
        """Whether the model carries adapters that are not merged into it."""
        return self.model is not None and hasattr(self.model, "peft_config")

    @property
    def plain(self) -> "PreTrainedModel":
        """The Hugging Face model itself, adapters among its modules or not."""
        return cast("PreTrainedModel", self.model.get_base_model() if self.adapted else self.model)  # type: ignore[union-attr, operator]

    @property
    def packable(self) -> bool:
        """Whether the model keeps examples apart that share a row; told from its config, before it is loaded."""
        known = ARCHITECTURES.get(loading.read_config(self.source).model_type)
        return known is not None and known.packable

    @property
    def variable_length_attention(self) -> bool:
        """Whether attention over a packed row costs no more than over its examples."""
        return "flash" in str(getattr(self.load_model().config, "_attn_implementation", ""))

    def merge_adapters(self) -> "PreTrainedModel":
        """Adds the adapters to the weights and removes them; returns the plain Hugging Face model."""
        if self.adapted:
            self.model = merge_adapters(cast("PeftModel", self.model))
            self._merged = True
        return self.load_model()

    def on_fit_start(self) -> None:
        """Loads the teacher, if there is one."""
        if self.distillation is not None:
            self._teacher = Teacher.load(self.distillation, self.source, self.plans, self.plain, self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CausalLM":
        if self.streaming:
            return self  # the weights stay in their files
        # A run in 16 bit as a whole casts everything. Transformers keeps the frequencies of rotary embeddings in
        # float32 whatever the dtype of the weights: rounded, a position of 256 would be off by a tenth of a radian. And
        # AdamW cannot train adapters in bfloat16: most updates, and the decay of its moments, are below its precision.
        kept = {name: b for name, b in self.named_buffers() if b.dtype == torch.float32}
        if self.adapted:
            trained = ((name, p.data) for name, p in self.named_parameters() if p.requires_grad)
            kept |= {name: p for name, p in trained if p.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, tensor in (*self.named_buffers(), *self.named_parameters()):
            if name in kept and tensor.dtype != torch.float32:
                tensor.data = kept[name].to(tensor.device)
        return self

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Nothing: the test hooks measure."""

    def predict_step(self, batch: dict[str, str], batch_idx: int) -> dict[str, str]:
        """Completes a prompt greedily.

        Returns:
            The batch and ``completion``.
        """
        assert self.model is not None
        completion = complete(self.model, self.tokenizer, batch["prompt"], self.max_new_tokens)
        self.predictions.append({**batch, "completion": completion})
        return self.predictions[-1]

    def on_predict_start(self) -> None:
        """Forgets the completions of an earlier run."""
        self.predictions = []

    def on_predict_epoch_end(self) -> None:
        """Writes ``predictions.json``, with the completions of all ranks in the order of the prompts."""
        parts = [self.predictions]
        if dist.is_available() and dist.is_initialized():
            parts = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, self.predictions)
        # Lightning deals the prompts out in turn.
        self.predictions = [p for turn in zip_longest(*parts) for p in turn if p is not None]
        if self.trainer.is_global_zero and self.predictions:
            path = Path(self.trainer.default_root_dir) / "predictions.json"
            files.write_text(path, json.dumps(self.predictions, indent=1, ensure_ascii=False) + "\n")
            rank_zero_info(f"Completions: {path}")

    def on_test_start(self) -> None:
        """Opens the record that the hooks fill. What is measured is what would be exported: adapters are merged."""
        model = self.merge_adapters()
        base = self.plans[0].base.pretrained if self.plans else self.pretrained
        self.results = Results(
            model=ModelIdentity(
                label=self.label or Path(self.trainer.default_root_dir).name,
                source=self.pretrained,
                base=base,
                num_layers=num_layers(model),
                num_parameters=count_parameters(model),
                plan_sha256=self.plans[-1].sha256 if self.plans else None,
                requested_ratio=self.plans[0].requested_ratio if len(self.plans) == 1 else None,
                quantization=quantization_of(model.config),
            ),
            environment=Environment.collect(self.device, str(model.dtype).removeprefix("torch.")),
        )

        self.journal = Journal(self.trainer.default_root_dir, self._about(self.results))
        if self.trainer.is_global_zero and not may_overwrite(self.trainer):
            self.journal.open()

    def _about(self, results: Results) -> dict[str, object]:
        """What decides the figures of a test beside what the hooks are asked: weights, machine, program."""
        directory, checkpoint, config = self.source.directory, self.trainer.ckpt_path, self.plain.config
        return {
            "model": dataclasses.asdict(dataclasses.replace(results.model, label="")),
            "environment": dataclasses.asdict(dataclasses.replace(results.environment, date="")),
            "revision": getattr(config, "_commit_hash", None),
            "lora": None if self.lora is None else dataclasses.asdict(self.lora),
            "attention": str(getattr(config, "_attn_implementation", None)),
            "plans": [plan.sha256 for plan in self.plans],
            "files": None if directory is None else identity.contents(directory),
            "checkpoint": None if checkpoint is None else identity.content_of(checkpoint),
            "processes": self.trainer.world_size,
        }

    def once(self, asked: object, form: type[T], measure: Callable[[], T]) -> T:
        """A finished figure of a test that was killed, else what ``measure`` returns, which is written down.

        To be called on all ranks.

        Args:
            asked: All that decides the figure beside the model and the machine.
            form: The dataclass that ``measure`` returns.
            measure: Measures.
        """
        assert self.journal is not None
        found = self.trainer.strategy.broadcast(self.journal.find(asked, form))
        if found is not None:
            return found
        figure = measure()
        if self.trainer.is_global_zero:
            self.journal.keep(asked, figure)
        return figure

    def measured(self) -> "tuple[PreTrainedModel, Results]":
        """What a test hook needs: the model it measures, and the record it fills."""
        assert self.results is not None
        return self.load_model(), self.results

    def on_test_end(self) -> None:
        """Writes ``results.json``."""
        assert self.results is not None
        if self.trainer.is_global_zero:
            path = results_file(self.trainer)
            self.results.save(path)
            if self.journal is not None:
                self.journal.close()
                if self.journal.found:
                    rank_zero_info(f"{self.journal.found} figures are of a test of this model that was broken off")
            rank_zero_info(f"Results: {path}")


def may_overwrite(trainer: pl.Trainer) -> bool:
    """Whether the user passed ``--overwrite``; a trainer made in Python has it as an attribute, or not at all."""
    return bool(getattr(trainer, "overwrite", False))


def results_file(trainer: pl.Trainer) -> Path:
    """Where ``test`` writes its figures."""
    return Path(trainer.default_root_dir) / "results.json"
