"""The phases of a config, with what each takes: the command ``estimate``."""

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentParser

from slm_pl import loading
from slm_pl.compression.architecture import architecture_of, cache_values, decoder_layers, num_layers, output_of
from slm_pl.compression.least_squares import CHUNK
from slm_pl.compression.plan import count_parameters, load_plans
from slm_pl.data import CalibrationText, EvaluationText, TrainingData, load_calibration, load_evaluation
from slm_pl.documents import parse_json
from slm_pl.errors import UsageError
from slm_pl.estimate.costs import (
    Generation,
    Model,
    Phase,
    Recipe,
    Text,
    generation_cost,
    reading_cost,
    recovery_cost,
    search_cost,
)
from slm_pl.estimate.rehearsal import Rehearsal, Work
from slm_pl.recovery.adapters import LoRA, add_adapters
from slm_pl.recovery.memory import Sizes, Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ARCHITECTURES = Path(__file__).resolve().parents[2] / "configs" / "architectures"
ROWS = {"yahma/alpaca-cleaned": 51_760, "tatsu-lab/alpaca": 52_002}
"""Rows of data sets, as their pages on the Hub count them."""
ROW_TOKENS, ANSWERED = 110, 0.51
"""Of 9,229 of Alpaca's rows, cut at 256, in tokens of SmolLM2; and the share of them that is response."""
WIKITEXT2_TOKENS = 304_735
"""Of the raw test set, in tokens of SmolLM2; Llama's are some 10 % more."""
WIKITEXT_ROW_TOKENS = 70
"""Of a row of it, of which there are 4,358."""
QUESTIONS = {
    "boolq": (3270, 2, 196),
    "piqa": (1838, 2, 77),
    "hellaswag": (10042, 4, 170),
    "winogrande": (1267, 2, 45),
    "arc_easy": (2376, 4, 107),
    "arc_challenge": (1172, 4, 147),
    "openbookqa": (500, 4, 46),
    "embedded_docstrings": (100, 4, 120),
}
"""Questions of a task, answers of each, and tokens that all of them take, padding included: SmolLM2's, of the first 100
questions on average."""
STRATEGIES: dict[str, tuple[Strategy, bool]] = {
    "ddp": ("ddp", False),
    "deepspeed": ("deepspeed_stage_2", False),
    "deepspeed_stage_1": ("deepspeed_stage_1", False),
    "deepspeed_stage_2": ("deepspeed_stage_2", False),
    "deepspeed_stage_2_offload": ("deepspeed_stage_2", True),
    "deepspeed_stage_3": ("deepspeed_stage_3", False),
    "deepspeed_stage_3_offload": ("deepspeed_stage_3_offload", False),
}
"""By Lightning's name: that of the formulas, and whether the optimizer's state is in main memory."""
LIGHTNINGS_BUCKET = 200_000_000
PROMPT_TOKENS = 12  # of a protocol's own text


@dataclass
class Estimate:
    """What a config takes.

    Args:
        name: Of the config.
        phases: In their order.
        parameters: Before and after.
        left_out: What was not counted, or assumed, and why.
    """

    name: str
    phases: list[Phase] = field(default_factory=list)
    parameters: tuple[float, float] = (0, 0)
    left_out: list[str] = field(default_factory=list)


def find_config(source: loading.Source, architecture: str | None) -> "PreTrainedConfig":
    """The sizes of a model: of a file, of ``configs/architectures``, else of the model itself.

    Raises:
        UsageError: If there is no such file, or the model cannot be reached.
    """
    from transformers import AutoConfig

    paths = sorted(ARCHITECTURES.glob("*.json")) if architecture is None else [Path(architecture)]
    for path in paths:
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise TypeError(f"it is a {type(content).__name__}")
            if architecture is not None or content.get("_name_or_path") == source.pretrained:
                loading.check_sizes(content, str(path))
                return AutoConfig.for_model(content.pop("model_type"), **content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--architecture {path} is no config of a model: {error!r}. Give a config.json of transformers."
            ) from None
    return loading.read_config(source)


def objects_of(entries: Sequence[Mapping[str, Any]]) -> list[pl.Callback]:
    """The callbacks of a config."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[pl.Callback])
    made = parser.instantiate(parser.parse_object({"callbacks": list(entries)}))
    return list(made.callbacks)


def data_of(entry: Mapping[str, Any]) -> TrainingData:
    """The data module of a config."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=TrainingData)
    data = parser.instantiate(parser.parse_object({"data": dict(entry)})).data
    assert isinstance(data, TrainingData)
    return data


def gpus_of(trainer: Mapping[str, Any]) -> int | None:
    """Processes of a run; None where the config leaves it to Lightning."""
    devices = trainer.get("devices")
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    elif isinstance(devices, str) and devices.isdecimal():
        devices = int(devices)
    count = len(devices) if isinstance(devices, list) else devices
    if not isinstance(count, int) or count < 1:
        return None
    return count * int(trainer.get("num_nodes") or 1)


def strategy_of(trainer: Mapping[str, Any], gpus: int) -> tuple[Strategy, bool, int]:
    """How :func:`~slm_pl.recovery.memory.training_memory` calls a strategy, whether it offloads, and its bucket.

    Raises:
        UsageError: If there are no formulas for it.
    """
    given = trainer.get("strategy") or "auto"
    if isinstance(given, str):
        if given == "auto" or given.startswith("ddp"):
            return ("single_device" if gpus == 1 else "ddp"), False, 0
        if given in STRATEGIES:
            return *STRATEGIES[given], LIGHTNINGS_BUCKET
    else:
        name, arguments = str(given.get("class_path", "")).rpartition(".")[2], given.get("init_args") or {}
        if name == "DDPStrategy":
            return strategy_of({"strategy": "ddp"}, gpus)
        if name == "DeepSpeedStrategy" and arguments.get("stage", 2) in (1, 2, 3):
            stage = f"deepspeed_stage_{arguments.get('stage', 2)}"
            offload = arguments.get("offload_optimizer") or arguments.get("offload_parameters")
            known = STRATEGIES.get(f"{stage}_offload" if offload else stage, STRATEGIES[stage])
            return *known, int(arguments.get("reduce_bucket_size") or LIGHTNINGS_BUCKET)
    raise UsageError(
        f"trainer.strategy is {given}, for whose memory there are no formulas. There are some for auto, ddp and "
        f"{', '.join(name for name in STRATEGIES if name != 'ddp')}."
    )


class _Estimator:
    """One config; see :func:`estimate`."""

    def __init__(self, name: str, run: Mapping[str, Any], architecture: str | None) -> None:
        self.run, self.found = run, Estimate(name)
        settings, self.trainer = run["model"], run["trainer"]
        self.settings = settings
        if not settings.get("pretrained"):
            raise UsageError(f"{name} names no model.pretrained. Each --config is a whole run; let one lie on `parts`.")
        gpus = gpus_of(self.trainer)
        self.gpus = 1 if gpus is None else gpus
        if gpus is None:
            self._leave_out("trainer.devices is Lightning's choice: as one")
        if settings["quantization"] is not None:
            self._leave_out("model.quantization: as if the weights were in their own dtype")
        self.source = loading.resolve(settings["pretrained"], settings["revision"], bool(settings["trust_remote_code"]))
        config = find_config(self.source, architecture)
        self.dtype = self._dtype(settings["dtype"], config)
        self.empty = loading.empty_model(config, dtype=self.dtype)
        architecture_of(self.empty)  # tells one that is not known
        self.data = data_of(run["data"])
        half = str(self.trainer["precision"]) in ("bf16-true", "16-true")
        self.dense = Model(self.empty, self.dtype.itemsize, streamed=settings["streaming"])
        self.later = replace(self.dense, itemsize=2) if half else self.dense
        if settings["streaming"]:
            self._leave_out("streaming: of prune only, and without the time to read the layers from their files")
        self.inputs = Sizes.of(self.empty, config, 0).intermediate
        self.callbacks = objects_of(self.trainer["callbacks"] or [])
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def _leave_out(self, reason: str) -> None:
        self.found.left_out.append(reason)

    def _dtype(self, name: str, config: "PreTrainedConfig") -> torch.dtype:
        dtype = getattr(torch, name) if name != "auto" else getattr(config, "dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype
        self._leave_out("model.dtype is auto and the sizes say none: bfloat16")
        return torch.bfloat16

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Of the model, if that is on this machine."""
        if self._tokenizer is None:
            self._tokenizer = loading.load_tokenizer(self.source)
        return self._tokenizer

    def _here(self, source: str) -> bool:
        """Whether a text, and a tokenizer for it, can be read without network."""
        local = self.settings["pretrained"]
        return (source == "embedded" or os.path.exists(source)) and (
            local.startswith("package:") or os.path.exists(local)
        )

    def _calibration(self, texts: Iterable[CalibrationText]) -> Text:
        """All samples of some texts."""
        parts: list[Text] = []
        for text in texts:
            samples, length = text.samples, text.sequence_length
            if self._here(text.source) and (text.sampling == "stream" or text.source.endswith(".json")):
                found = [sample for batch in load_calibration(text, self.tokenizer) for sample in batch]
                samples, length = len(found), round(sum(map(len, found)) / len(found))
            elif text.sampling == "stream":
                if "wikitext" in text.source:
                    samples = max(1, samples * WIKITEXT_ROW_TOKENS // length)
                    self._leave_out(f"a row of {text.source} as {WIKITEXT_ROW_TOKENS} tokens")
                else:
                    self._leave_out(f"each document of {text.source} as one sample of {length} tokens")
            parts.append(Text(samples, length, text.batch_size))
        tokens, samples = sum(part.tokens for part in parts), sum(part.samples for part in parts)
        return Text(samples, round(tokens / samples), max(part.batch for part in parts))

    def compression(self) -> Model:
        """Search and refits of every method; returns what is left."""
        model, total = self.dense, num_layers(self.empty)
        carried = [] if self.source.directory is None else load_plans(self.source.directory)
        made = {plan.method.class_path.rpartition(".")[2] for plan in carried}
        rehearsal: Rehearsal | None = None
        for method in (c for c in self.callbacks if callable(getattr(c, "decide", None))):
            name = type(method).__name__
            if name in made:
                self._leave_out(f"{name}: {self.settings['pretrained']} carries its plan, so it does not act")
                continue
            if getattr(method, "plan_path", None):
                raise UsageError(f"{name} has a plan_path, so nothing is searched. Leave it out (null).")
            left = self._left(method, model)
            rehearsal = rehearsal or Rehearsal(total, self.inputs / self.dense.hidden)
            try:
                with warnings.catch_warnings():
                    # The weights are random: no two layers of them are alike.
                    warnings.filterwarnings("ignore", message="SlidingWindowMerging merged nothing")
                    work, fit = rehearsal.perform(method, left is not None)  # type: ignore[arg-type]
                self._searched(method, model, work, fit)
            except UsageError as error:
                self._leave_out(f"the search of {name}, which cannot be rehearsed on a narrow model: {error}")
            if left is None:
                self._leave_out(f"what {name} removes is not known before: as if nothing")
            model = left or model
        return model

    def _searched(self, method: object, model: Model, work: Work, fit: Work | None) -> None:
        text, limit = self._calibration([self.data.calibration]), None
        if hasattr(method, "memory_budget"):
            limit = (method.memory_budget or 2.0) * 2**30
        self.found.phases.append(search_cost("search", model, work, text, self.gpus, self.inputs, limit))
        if fit is not None:
            fitted = self._calibration(self.data.fitting or [self.data.calibration])
            fitted = replace(fitted, batch=max(1, CHUNK // fitted.length))
            self.found.phases.append(search_cost("least squares", model, fit, fitted, self.gpus, self.inputs))

    def _left(self, method: Any, model: Model) -> Model | None:
        """What a method leaves of a model, if its size is known before; sets its number of layers."""
        total, name = num_layers(self.empty), type(method).__name__
        count = round(total * model.depth)
        ratio, layers = getattr(method, "ratio", None), getattr(method, "remove_layers", None)
        named = getattr(method, "layers", None)
        if ratio is not None or layers is not None or named is not None:
            each = model.layer_parameters * model.width
            if hasattr(method, "remove_layers"):
                gone = len(named) if named is not None else layers or round((ratio or 0) * model.parameters / each)
                if not 1 <= gone < count:
                    raise UsageError(f"{name} is to remove {gone} of {count} layers; 1 to {count - 1} can go.")
                if named is None:
                    method.remove_layers, method.ratio = gone, None
                return replace(model, depth=(count - gone) / total)
            width = 1 - (ratio or 0) * model.parameters / (each * count)
            if width <= 0:
                most = each * count / model.parameters
                raise UsageError(f"ratio of {name} is {ratio}; the layers are {most:.0%} of the parameters.")
            return replace(model, width=model.width * width)
        if getattr(method, "layer_ratio", None) is not None:
            ranges = [method.attention_layers, method.mlp_layers]
            inside = [0 if part is None else len(range(total)[slice(*part)]) / total for part in ranges]
            mlp = output_of(self.empty, 0, "mlp")
            of_mlp = 2 / 3 if mlp is None else 3 * mlp.map.weight.numel() / model.layer_parameters
            share = (1 - of_mlp) * inside[0] + of_mlp * inside[1]
            return replace(model, width=model.width * (1 - method.layer_ratio * share))
        return None

    def _steps(self, rows: int) -> tuple[int, float] | None:
        """Optimizer steps, and how many of them are an epoch; None if the config leaves it open."""
        trainer, data = self.trainer, self.data
        steps, epochs = trainer["max_steps"], trainer["max_epochs"]
        there = ROWS.get(getattr(data, "path", ""))
        most = getattr(data, "max_rows", None)
        there = min(there, most or there) if there is not None else most
        epoch = math.inf if there is None else math.ceil(max(there - data.val_size, 1) / rows)
        if steps is not None and steps >= 0:
            return round(min(steps, epoch * epochs if epochs is not None and epochs > 0 else math.inf)), epoch
        if epochs is None or epochs < 1 or there is None:
            return None
        return round(epoch * epochs), epoch

    def recovery(self, model: Model) -> None:
        """Training of what is left."""
        data, trainer = self.data, self.trainer
        longest = getattr(data, "cutoff", None) or getattr(data, "sequence_length", None)
        accumulated = trainer["accumulate_grad_batches"] or 1
        rows = data.global_batch_size or data.batch_size * self.gpus * accumulated
        planned = self._steps(rows)
        if longest is None or planned is None:
            self._leave_out("recovery: how long it is does not stand in the config; give trainer.max_steps")
            return
        steps, epoch = planned
        if not steps:
            return
        instructions = hasattr(data, "cutoff")
        if instructions and "alpaca" not in str(getattr(data, "path", "")):
            self._leave_out(f"rows of {getattr(data, 'path', 'data')} as long as Alpaca's, {ROW_TOKENS} tokens")
        if any(trainer[f"limit_{part}_batches"] not in (None, 1.0) for part in ("train", "val")):
            self._leave_out("trainer.limit_train_batches and limit_val_batches: as if there were none")
        every, micro = trainer["val_check_interval"] or 1.0, max(1, rows // (data.batch_size * self.gpus))
        if isinstance(every, int | float) and not isinstance(every, bool):
            between = max(1.0, every * epoch if isinstance(every, float) else every / micro)
            validations = 0 if between == math.inf else math.floor(steps / between + 1e-9)
        else:
            validations = 0
            self._leave_out("validation, which goes by the clock")
        lora, config = self.settings["lora"], self.empty.config
        if lora is None:
            sizes = replace(Sizes.of(self.empty, config, 0), frozen=0, trainable=round(model.parameters))
            if self.settings["last_layers"] is not None:
                self._leave_out("model.last_layers: as if all weights were trained")
        else:
            arguments = {key: lora[key] for key in LoRA.__dataclass_fields__}
            adapted = add_adapters(loading.empty_model(config, dtype=self.dtype), LoRA(**arguments), float32=True)
            sizes = Sizes.of(adapted, config, lora["r"])
            trained = round(sizes.trainable * model.depth * model.width)
            sizes = replace(sizes, frozen=round(model.parameters), trainable=trained)
        strategy, offloaded, bucket = strategy_of(trainer, self.gpus)
        recipe = Recipe(
            rows=rows,
            steps=steps,
            batch=data.batch_size,
            length=min(ROW_TOKENS, longest) if instructions else longest,
            longest=longest,
            answered=ANSWERED if instructions else 1.0,
            validated=data.val_size * validations,
            validation_batch=data.eval_batch_size,
            checkpointed=self.settings["gradient_checkpointing"],
            teacher=self.settings["distillation"] is not None,
            strategy=strategy,
            offloaded=offloaded,
            bucket=bucket,
        )
        sizes = replace(sizes, layers=round(num_layers(self.empty) * model.depth))
        self.found.phases.append(recovery_cost(model, self.later, sizes, recipe, self.gpus))

    def _windows(self, texts: Sequence[EvaluationText], batch: int) -> Iterator[Text]:
        for text in texts:
            rules = text.protocol()
            tokens = WIKITEXT2_TOKENS if rules.source == "wikitext2" else None
            if self._here(rules.source):
                yield Text(len(load_evaluation(text, self.tokenizer).ids), rules.sequence_length, batch)
                continue
            tokens = rules.max_tokens if tokens is None else min(tokens, rules.max_tokens or tokens)
            if tokens is None:
                self._leave_out(f"perplexity of {rules.label}: its length is not known")
                continue
            step = rules.stride or rules.sequence_length
            yield Text(math.ceil(tokens / step), rules.sequence_length, batch)

    def evaluation(self, model: Model) -> None:
        """The hooks of ``test`` on what is left."""
        for callback in self.callbacks:
            kind = type(callback).__name__
            known: Any = callback
            if kind == "Perplexity":
                texts = list(self._windows(known.texts, known.batch_size))
                self.found.phases.append(reading_cost("perplexity", model, texts, self.gpus))
            elif kind == "ZeroShot":
                batch = known.batch_size if isinstance(known.batch_size, int) else 8
                asked = []
                for task in known.tasks:
                    shots = known.num_fewshot
                    if task not in QUESTIONS or (shots.get(task) if isinstance(shots, dict) else shots):
                        self._leave_out(f"zero-shot {task}: its length is not known")
                        continue
                    questions, answers, tokens = QUESTIONS[task]
                    requests = answers * min(questions, known.limit or questions)
                    asked.append(Text(requests, round(tokens / answers), batch))
                self.found.phases.append(reading_cost("zero-shot", model, asked, self.gpus))
            elif kind == "Efficiency":
                runs = [
                    Generation(p.repeats + known.warmup, p.batch_size, p.prompt_tokens or PROMPT_TOKENS, p.new_tokens)
                    for p in known.points
                ]
                values = cache_values(decoder_layers(self.empty)[0], architecture_of(self.empty))
                self.found.phases.append(generation_cost(model, runs, values))
            elif kind in ("RepresentationSimilarity", "Drift", "Examples"):
                self._leave_out(f"{kind}: a pass or two")

    def done(self) -> Estimate:
        """All phases."""
        left = self.compression()
        model = replace(self.later, depth=left.depth, width=left.width)
        self.found.parameters = (count_parameters(self.empty), model.parameters)
        self.recovery(model)
        self.evaluation(model)
        return self.found


def estimate(name: str, run: Mapping[str, Any], architecture: str | None = None) -> Estimate:
    """What a run takes, without its weights.

    Args:
        name: For the table.
        run: The whole config of ``fit``, as ``--print_config`` shows it.
        architecture: A ``config.json``; null looks in ``configs/architectures``, then at the model itself.

    Raises:
        UsageError: If the model's sizes cannot be found, or the config cannot be run.
    """
    return _Estimator(name, run, architecture).done()
