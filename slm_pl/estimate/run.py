"""The phases of a config, with what each takes: the command ``estimate``."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from jsonargparse import ArgumentParser

from slm_pl import loading
from slm_pl.compression.architecture import architecture_of, cache_values, decoder_layers, num_layers
from slm_pl.compression.least_squares import CHUNK
from slm_pl.compression.plan import count_parameters
from slm_pl.compression.target import layers_share, layers_to_remove
from slm_pl.data import CalibrationText, EvaluationText, TrainingData, load_calibration, load_evaluation
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
from slm_pl.estimate.rehearsal import Method, rehearse
from slm_pl.recovery.adapters import LoRA, add_adapters
from slm_pl.recovery.memory import Sizes, Strategy

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ARCHITECTURES = Path("configs/architectures")
ROWS = {"yahma/alpaca-cleaned": 51_760, "tatsu-lab/alpaca": 52_002}
"""Rows of data sets, as their pages on the Hub count them."""
ROW_TOKENS, ANSWERED = 110, 0.51
"""Of 9,229 of Alpaca's rows, cut at 256, in tokens of SmolLM2; and the share of them that is response."""
WIKITEXT2_TOKENS = 304_735
"""Of the raw test set, in tokens of SmolLM2; Llama's are some 10 % more."""
QUESTIONS = {
    "boolq": (3270, 196),
    "piqa": (1838, 77),
    "hellaswag": (10042, 170),
    "winogrande": (1267, 45),
    "arc_easy": (2376, 107),
    "arc_challenge": (1172, 147),
    "openbookqa": (500, 46),
    "embedded_docstrings": (100, 120),
}
"""Questions of a task, and tokens that all answers of one take, padding included: those of SmolLM2 on the first 100."""
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


def find_config(pretrained: str, revision: str | None, architecture: str | None) -> "PreTrainedConfig":
    """The sizes of a model: of a file, of ``configs/architectures``, else of the model itself.

    Raises:
        UsageError: If there is no such file, or the model cannot be reached.
    """
    from transformers import AutoConfig

    paths = sorted(ARCHITECTURES.glob("*.json")) if architecture is None else [Path(architecture)]
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if architecture is not None or content.get("_name_or_path") == pretrained:
                return AutoConfig.for_model(content.pop("model_type"), **content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--architecture {path} is no config of a model: {error!r}. Give a config.json of transformers."
            ) from None
    return loading.read_config(loading.resolve(pretrained, revision))


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


def gpus_of(trainer: Mapping[str, Any]) -> int:
    """Processes of a run; one where the config leaves it to Lightning."""
    devices = trainer.get("devices")
    count = len(devices) if isinstance(devices, list) else devices
    count = int(count) if isinstance(count, int) or (isinstance(count, str) and count.isdecimal()) else 1
    return max(count, 1) * int(trainer.get("num_nodes") or 1)


def strategy_of(trainer: Mapping[str, Any], gpus: int) -> Strategy:
    """The name by which :func:`~slm_pl.recovery.memory.training_memory` knows a config's strategy."""
    given = trainer.get("strategy")
    if isinstance(given, Mapping) and "stage" in (given.get("init_args") or {}):
        arguments = given["init_args"]
        offload = arguments["stage"] == 3 and arguments.get("offload_parameters")
        return f"deepspeed_stage_{arguments['stage']}{'_offload' if offload else ''}"  # type: ignore[return-value]
    if isinstance(given, str) and given.startswith("deepspeed_stage_"):
        return given  # type: ignore[return-value]
    return "single_device" if gpus == 1 else "ddp"


class _Estimator:
    """One config; see :func:`estimate`."""

    def __init__(self, name: str, run: Mapping[str, Any], architecture: str | None) -> None:
        self.run, self.found = run, Estimate(name)
        settings = run["model"]
        self.settings, self.trainer = settings, run["trainer"]
        self.gpus = gpus_of(self.trainer)
        config = find_config(settings["pretrained"], settings.get("revision"), architecture)
        self.dtype = self._dtype(settings["dtype"], config)
        self.empty = loading.empty_model(config, dtype=self.dtype)
        self.dense = Model(self.empty, self.dtype.itemsize, streamed=settings["streaming"])
        if settings["streaming"]:
            self.found.left_out.append("streaming: prune only, and the time to read the layers from their files")
        self.inputs = Sizes.of(self.empty, config, 0).intermediate
        self.callbacks = objects_of(self.trainer["callbacks"] or [])
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def _dtype(self, name: str, config: "PreTrainedConfig") -> torch.dtype:
        dtype = getattr(torch, name) if name != "auto" else getattr(config, "dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype
        self.found.left_out.append("model.dtype is auto and the sizes say none: bfloat16")
        return torch.bfloat16

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Of the model, if that is on this machine."""
        if self._tokenizer is None:
            self._tokenizer = loading.load_tokenizer(loading.resolve(self.settings["pretrained"]))
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
            samples = text.samples
            if text.sampling == "stream" and self._here(text.source):
                samples = load_calibration(text, self.tokenizer).samples
            elif text.sampling == "stream":
                self.found.left_out.append(f"each document of {text.source} as one sample of {text.sequence_length}")
            parts.append(Text(samples, text.sequence_length, text.batch_size))
        tokens, samples = sum(part.tokens for part in parts), sum(part.samples for part in parts)
        return Text(samples, round(tokens / samples), max(part.batch for part in parts))

    def compression(self) -> float:
        """Search and refits of every method; returns how much of the layers is left."""
        methods = [c for c in self.callbacks if callable(getattr(c, "decide", None))]
        if not methods:
            return 1.0
        data = data_of(self.run["data"])
        kept, total = 1.0, num_layers(self.empty)
        share = layers_share(self.empty, total)
        for method in methods:
            method_name = type(method).__name__
            left, rest = total * kept, kept * share + 1 - share
            ratio, layers = getattr(method, "ratio", None), getattr(method, "remove_layers", None)
            if getattr(method, "plan_path", None):
                raise UsageError(f"{method_name} has a plan_path, so nothing is searched. Leave it out (null).")
            if hasattr(method, "remove_layers") and (ratio is not None or layers is not None):
                gone = layers_to_remove(self.empty, layers, None if layers is not None else ratio, total - 1, "of it")
                method.remove_layers, method.ratio = gone, None  # type: ignore[attr-defined]
                kept *= (left - gone) / left
            elif ratio is not None:
                kept -= ratio * rest / share
            elif getattr(method, "layer_ratio", None) is not None:
                kept *= 1 - method.layer_ratio  # type: ignore[attr-defined]
            else:
                self.found.left_out.append(f"what {method_name} removes is not known before: as if nothing")
        named: list[Method] = methods  # type: ignore[assignment]
        done = rehearse(named, total, self.inputs / self.dense.hidden)
        for method, (work, fit) in zip(methods, done, strict=True):
            text, budget = self._calibration([data.calibration]), getattr(method, "memory_budget", None)
            limit = None if budget is None else budget * 2**30
            self.found.phases.append(search_cost(self.dense, work, text, self.gpus, self.inputs, limit))
            if fit is not None:
                fitted = self._calibration(data.fitting or [data.calibration])
                fitted = replace(fitted, batch=max(1, CHUNK // fitted.length))
                self.found.phases.append(search_cost(self.dense, fit, fitted, self.gpus, self.inputs))
        return kept

    def recovery(self, model: Model) -> None:
        """Training of what is left."""
        data, trainer = self.run["data"]["init_args"], self.trainer
        instructions = "sequence_length" not in data
        longest = data["cutoff"] if instructions else data["sequence_length"]
        length = min(ROW_TOKENS, longest) if instructions else longest
        rows = data["global_batch_size"] or data["batch_size"] * self.gpus * (trainer["accumulate_grad_batches"] or 1)
        there = data.get("max_rows") or ROWS.get(data.get("path"))
        steps, epochs = trainer["max_steps"], trainer["max_epochs"]
        examples = None if there is None else there - data["val_size"]
        if examples is not None and (epochs or -1) > 0:
            planned = epochs * math.ceil(examples / rows)
            steps = planned if steps is None or steps < 1 else min(steps, planned)
        if steps is None or steps < 1:
            self.found.left_out.append("recovery: how many rows the data have is not known; give trainer.max_steps")
            return
        every = trainer["val_check_interval"] or 1.0
        if isinstance(every, float):
            every = max(1, round(every * math.ceil((examples or steps * rows) / rows)))
        lora = self.settings["lora"]
        config = self.empty.config
        if lora is None:
            whole = Sizes.of(self.empty, config, 0)
            sizes = replace(whole, frozen=0, trainable=round(model.parameters))
            if self.settings["last_layers"] is not None:
                self.found.left_out.append("last_layers: as if all weights were trained")
        else:
            arguments = {key: lora[key] for key in LoRA.__dataclass_fields__}
            adapted = add_adapters(loading.empty_model(config, dtype=self.dtype), LoRA(**arguments), float32=True)
            sizes = Sizes.of(adapted, config, lora["r"])
            trained = round(sizes.trainable * model.kept)
            sizes = replace(sizes, frozen=round(model.parameters), trainable=trained)
        recipe = Recipe(
            rows=rows,
            steps=steps,
            batch=data["batch_size"],
            length=length,
            longest=longest,
            answered=ANSWERED if instructions else 1.0,
            validated=data["val_size"] * (steps // every),
            checkpointed=self.settings["gradient_checkpointing"],
            teacher=self.settings["distillation"] is not None,
            strategy=strategy_of(trainer, self.gpus),
        )
        sizes = replace(sizes, layers=round(model.layers))
        self.found.phases.append(recovery_cost(model, self.dense, sizes, recipe, self.gpus))

    def _windows(self, texts: Sequence[EvaluationText], batch: int) -> Iterator[Text]:
        for text in texts:
            rules = text.protocol()
            tokens = WIKITEXT2_TOKENS if rules.source == "wikitext2" else None
            if self._here(rules.source):
                windows = load_evaluation(text, self.tokenizer)
                tokens = sum(map(len, windows.ids))
            tokens = rules.max_tokens if tokens is None else min(tokens, rules.max_tokens or tokens)
            if tokens is None:
                self.found.left_out.append(f"perplexity of {rules.label}: its length is not known")
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
                    if task not in QUESTIONS or known.num_fewshot:
                        self.found.left_out.append(f"zero-shot {task}: its length is not known")
                        continue
                    questions, tokens = QUESTIONS[task]
                    asked.append(Text(min(questions, known.limit or questions), tokens, batch))
                self.found.phases.append(reading_cost("zero-shot", model, asked, self.gpus))
            elif kind == "Efficiency":
                runs = [
                    Generation(p.repeats + known.warmup, p.batch_size, p.prompt_tokens or PROMPT_TOKENS, p.new_tokens)
                    for p in known.points
                ]
                values = cache_values(decoder_layers(self.empty)[0], architecture_of(self.empty))
                self.found.phases.append(generation_cost(model, runs, values))
            elif kind in ("RepresentationSimilarity", "Drift", "Examples"):
                self.found.left_out.append(f"{kind}: a pass or two")

    def done(self) -> Estimate:
        """All phases."""
        kept = self.compression()
        model = replace(self.dense, kept=kept)
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
