"""Speed, memory, utilisation and work of generation, as a test hook."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks.base import EarlyCheck
from slm_pl import console, files, identity, loading
from slm_pl.compression.architecture import ARCHITECTURES, context_length, num_layers
from slm_pl.compression.plan import count_parameters
from slm_pl.errors import UsageError
from slm_pl.evaluation._ranks import agreed, patiently
from slm_pl.evaluation.efficiency.measuring import Settings, check_context, compare_point, measure_point, no_room
from slm_pl.evaluation.efficiency.nvml import GpuFigures
from slm_pl.evaluation.efficiency.paired import sides_of
from slm_pl.evaluation.efficiency.prompts import Prompts
from slm_pl.evaluation.efficiency.protocols import Point, ProtocolName, grid, with_lengths
from slm_pl.evaluation.efficiency.record import EfficiencyResult, Paired
from slm_pl.evaluation.efficiency.runs import CacheKind, SDPABackend, Switches
from slm_pl.evaluation.efficiency.work import machine_peak
from slm_pl.module import CausalLM
from slm_pl.report.efficiency_charts import efficiency_plot
from slm_pl.results import Results

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PICTURE = "efficiency.png"


class Efficiency(EarlyCheck):
    """Times generation in ``test`` over a grid, and adds speed, memory, utilisation and work to ``results.json``.

    Prefill and decode are told apart, warm-up is left out of everything, the end of text is suppressed so that all runs
    make equally many tokens, adapters are merged before, and beside every figure stands the least time that its work
    takes at what this machine's matrix products and copies reach. Protocols::

        - class_path: callbacks.Efficiency             # batch 1, 12 + 128 tokens: the figure quoted most
        - class_path: callbacks.Efficiency
          init_args: {protocol: shortened_llama}       # batch 1 to 256, 128 and 512 new tokens, 10 + 20 runs, sampled
        - class_path: callbacks.Efficiency
          init_args: {protocol: sleb}                  # 1 x 2,048 tokens read; batch 64, 64 + 128 tokens, greedy
        - class_path: callbacks.Efficiency
          init_args: {protocol: llm_pruner}            # operations (and time) of reading 64 tokens
        - class_path: callbacks.Efficiency
          init_args: {protocol: serving, batch_size: [1, 4, 16, 64]}  # latency and throughput against the batch

    Against the published programs: the attention mask is passed, prompts are real text, warm-up counts nowhere, the
    spread is that of a sample, and what did not fit into memory is written down as such while the grid goes on. With
    ``main.py test --baseline PATH`` a second model runs in turn with this one afterwards, so that what disturbs one
    disturbs the other; the record then holds how many times as fast this one is, with a confidence interval, and how
    much its layers and bytes promise. Under several processes the first one measures while the others wait.

    What runs is also ``model.dtype``, ``model.attn_implementation`` and ``model.quantization``; the record names it.

    Args:
        protocol: ``shortened_llama``, ``sleb``, ``llm_pruner`` or ``serving``; null for Shortened LLaMA's rules at one
            point. The next three replace its own, one number or several.
        batch_size: Prompts at once.
        prompt_tokens: Length of the prompts, which are passages of prose then.
        new_tokens: Tokens generated for each; 0 for a forward pass over the prompts.
        prompt: What to continue in place of prose or the protocol's text; of several texts, each row of a batch takes
            the next, padded on the left.
        warmup: Runs before counting; null for the protocol's.
        repeats: Runs that count; null for the protocol's.
        cache: Key/value cache: ``dynamic`` grows with the tokens, ``static`` has its length from the start.
        compile: Run decode steps (of a forward pass, all of it) through ``torch.compile``; needs ``cache: static`` and
            2 runs of warm-up.
        sdpa_backend: Allow one kernel of scaled dot-product attention only: ``flash``, ``efficient``, ``cudnn`` or
            ``math``.
        baseline: Another model, such as the dense one, to run in turn with this one: a Hub id, a directory, a ``.gguf``
            file, or ``package:NAME/FILE.gguf``. ``--baseline`` overrides it.

    Raises:
        UsageError: If a number is out of range, or options exclude each other.
    """

    def __init__(
        self,
        protocol: ProtocolName | None = None,
        batch_size: int | list[int] | None = None,
        prompt_tokens: int | list[int] | None = None,
        new_tokens: int | list[int] | None = None,
        prompt: str | list[str] | None = None,
        warmup: int | None = None,
        repeats: int | None = None,
        cache: CacheKind = "dynamic",
        compile: bool = False,  # noqa: A002  torch's word
        sdpa_backend: SDPABackend | None = None,
        baseline: str | None = None,
    ) -> None:
        if prompt is not None and prompt_tokens is not None:
            raise UsageError(
                f"Efficiency got a prompt and prompt_tokens {prompt_tokens}. Give a prompt, which has its length, or a "
                "length, for prose of so many tokens."
            )
        if warmup is not None and warmup < 0:
            raise UsageError(f"Efficiency got warmup {warmup}; allowed is 0 or more.")
        self.rules, self.points = grid(
            protocol, _several(batch_size), _several(prompt_tokens), _several(new_tokens), repeats, prompt is not None
        )
        if compile and cache == "dynamic" and any(point.new_tokens for point in self.points):
            raise UsageError(
                "Efficiency got compile: true with cache: dynamic, whose shapes change at every token. Add "
                "cache: static."
            )
        self.texts = [prompt] if isinstance(prompt, str) else prompt
        if self.texts is None and self.rules.prompt is not None:
            self.texts = [self.rules.prompt]
        if self.texts is not None and prompt is not None:
            most = max(point.batch_size for point in self.points)
            if len(self.texts) > most:
                raise UsageError(
                    f"Efficiency got {len(self.texts)} prompts and batches of {most} at most, in which some would "
                    f"never stand. Give batch_size {len(self.texts)} or more, or fewer prompts."
                )
        # Of a compiled model, the first run compiles, and the second one may record CUDA graphs.
        if compile and warmup is not None and warmup < 2:
            raise UsageError(
                f"Efficiency got compile: true and warmup {warmup}; the first two runs compile. Give 2 or more."
            )
        self.warmup = max(self.rules.warmup, 2 * compile) if warmup is None else warmup
        self.switches = Switches(cache, compile, sdpa_backend)
        self.baseline = baseline
        self._grid: list[Point] | None = None
        self._settings: Settings | None = None

    def check(self, trainer: pl.Trainer) -> None:
        """Makes the prompts and looks at the baseline, so that nothing is missing after a search."""
        if trainer.state.fn != TrainerFn.TESTING or self._settings is not None:
            return
        module = trainer.lightning_module
        assert isinstance(module, CausalLM)
        device = trainer.strategy.root_device.type
        if device == "cpu" and self.switches.sdpa_backend in ("efficient", "cudnn"):
            raise UsageError(
                f"Efficiency got sdpa_backend {self.switches.sdpa_backend}, which is for GPUs; on a CPU there are "
                "flash and math. Give one of them, or leave it out."
            )
        prompts = Prompts(module.tokenizer, self.texts)
        points = with_lengths(self.points, prompts.text_tokens)
        config = loading.read_config(module.source).get_text_config()
        check_context(module.pretrained, context_length(config), points)
        name = self._baseline(trainer)
        if name is not None:
            if config.model_type not in ARCHITECTURES:
                raise UsageError(
                    f"The baseline {name} cannot run in turn with {module.pretrained}: it is of model_type "
                    f"{config.model_type!r}, whose layers are not known here. Leave the baseline out, and compare two "
                    "results.json."
                )
            source = loading.resolve(name, None, module.source.trust_remote_code)
            theirs = loading.read_config(source).get_text_config().vocab_size
            if theirs != config.vocab_size:
                raise UsageError(
                    f"The vocabulary of the baseline {name} has {theirs} tokens, that of {module.pretrained} "
                    f"{config.vocab_size}; it has to be the same one. Give the model that this one was made of."
                )
        self._grid = points
        self._settings = Settings(self.rules, prompts, self.warmup, self.switches)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reads what is needed before any work."""
        self.check(trainer)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures on the first rank, point by point, while the others wait."""
        assert isinstance(pl_module, CausalLM)
        results = pl_module.measured()[1]
        name = self._baseline(trainer)
        with patiently() as group:
            begin = len(results.efficiency)
            agreed(lambda: self._measure(pl_module) if trainer.is_global_zero else None, group)
            if name is not None:
                agreed(lambda: self._compare(pl_module, name, begin) if trainer.is_global_zero else None, group)
        if trainer.is_global_zero:
            _draw(Path(trainer.default_root_dir) / PICTURE, results)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the prompts, which belong to a tokenizer."""
        self._grid = self._settings = None

    def _baseline(self, trainer: pl.Trainer) -> str | None:
        return cast("str | None", getattr(trainer, "baseline", None)) or self.baseline

    def _measure(self, module: CausalLM) -> None:
        """Measures the model alone at every point."""
        assert self._grid is not None  # `setup` comes before
        assert self._settings is not None
        assert module.journal is not None
        model, results = module.measured()
        found: list[GpuFigures] = []
        begin = len(results.efficiency)
        with console.progress("Efficiency", 1 + sum(self.warmup + point.repeats + 1 for point in self._grid)) as step:
            step("what the machine can do")
            peak = machine_peak(module.device, model.dtype)
            for point in self._grid:
                asked = self._asked(point, "alone")
                at = module.journal.find(asked, _AtPoint)
                if at is None:
                    at = _AtPoint(
                        *measure_point(
                            model,
                            module.tokenizer,
                            point,
                            self._settings,
                            peak,
                            lambda note, point=point: step(f"{point}: {note}"),  # type: ignore[misc]
                        )
                    )
                    module.journal.keep(asked, at)
                results.efficiency.append(at.figures)
                found.append(at.gpu or GpuFigures())
                if at.figures.latency_s is None:
                    rank_zero_warn(f"Efficiency, {point}: {at.figures.missing['latency_s']}")
        _tell_missing(results, begin, found)

    def _asked(self, point: Point, beside: object) -> list[object]:
        """All that decides what is measured at a point beside the model and the machine."""
        return [repr(self.rules), repr(point), self.warmup, repr(self.switches), self.texts, beside]

    def _compare(self, module: CausalLM, name: str, begin: int) -> None:
        """Runs the baseline in turn with the model, at every point where the model ran."""
        assert self._grid is not None
        assert self._settings is not None
        assert module.journal is not None
        model, results = module.measured()
        reason, dense = "", None
        try:
            dense = self._load(module, model, name)
        except Exception as error:
            reason = no_room(error) or ""
            if not reason:
                raise
            rank_zero_warn(f"Efficiency: the baseline {name} could not be loaded beside the model: {reason}")
        location = loading.resolve(name, None, module.source.trust_remote_code).location
        commit = None if dense is None else getattr(dense.config, "_commit_hash", None)
        content = identity.model_content(location, commit)
        pairs = sum(self.warmup + point.repeats for point in self._grid)
        with console.progress("Efficiency, in turn with the baseline", pairs) as step:
            for index, point in enumerate(self._grid, begin):
                figures = results.efficiency[index]
                if figures.latency_s is None:
                    continue
                asked = self._asked(point, [name, content])
                before = module.journal.find(asked, Paired)
                compared: Paired | str = before or f"with both models, {reason}"
                if before is None and dense is not None:
                    compared = compare_point(
                        dense,
                        name,
                        model,
                        module.tokenizer,
                        point,
                        self._settings,
                        lambda _, point=point: step(str(point)),  # type: ignore[misc]
                        figures.work,
                    )
                if isinstance(compared, Paired):
                    if before is None:
                        module.journal.keep(asked, compared)
                    results.efficiency[index] = replace(figures, paired=compared)
                else:
                    results.efficiency[index] = replace(figures, missing={**figures.missing, "paired": compared})

    def _load(self, module: CausalLM, model: "PreTrainedModel", name: str) -> "PreTrainedModel":
        """Loads the baseline as the model was loaded: dtype, attention and device."""
        source = loading.resolve(name, None, module.source.trust_remote_code)
        dtype = str(model.dtype).removeprefix("torch.")
        attention = getattr(model.config, "_attn_implementation", None)
        dense = loading.load_model(source, dtype, attention)  # type: ignore[arg-type]
        size = f"{num_layers(dense)} layers, {count_parameters(dense) / 1e6:,.1f} M parameters"
        rank_zero_info(f"Efficiency: in turn with {name}, {size}")
        return dense.to(module.device)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _AtPoint:
    """What is measured of the model alone at a point."""

    figures: EfficiencyResult
    gpu: GpuFigures | None


_PARTS = {
    "gpu_utilisation": ("utilisation",),
    "gpu_energy": ("energy",),
    "gpu_memory": ("memory.process", "memory.device"),
}
"""Where in a point's figures that is which NVML may not tell."""


def _tell_missing(results: Results, begin: int, found: list[GpuFigures]) -> None:
    """Writes down why figures of the GPU are absent: once if it is the same at all points that ran."""
    ran = [index for index, _ in enumerate(found, begin) if results.efficiency[index].latency_s is not None]
    for key, parts in _PARTS.items():
        reasons = {index: found[index - begin].missing.get(key) for index in ran}
        same = set(reasons.values())
        if len(same) == 1 and (reason := same.pop()) is not None:
            results.missing[key] = reason
            continue
        for index, reason in reasons.items():
            if reason is not None:
                figures = results.efficiency[index]
                missing = {**figures.missing, **dict.fromkeys(parts, reason)}
                results.efficiency[index] = replace(figures, missing=missing)


def _draw(path: Path, results: Results) -> None:
    """Draws the figures of this run, and those of the baseline that ran in turn with the model."""
    models = [(results.model.label, results.efficiency)]
    paired = [sides_of(figures) for figures in results.efficiency if figures.paired is not None]
    if paired:
        models = [("baseline", [theirs for theirs, _ in paired]), (results.model.label, [ours for _, ours in paired])]
    picture = efficiency_plot(models)
    if picture is None:
        path.unlink(missing_ok=True)  # of an earlier run
        return
    files.write_bytes(path, picture)
    rank_zero_info(f"Efficiency: {path}")


def _several(value: int | list[int] | None) -> list[int] | None:
    return [value] if isinstance(value, int) else value
