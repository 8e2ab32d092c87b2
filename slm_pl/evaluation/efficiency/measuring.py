"""Measures a model at the points of a grid, alone and in turn with a baseline."""

import contextlib
import gc
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from slm_pl.errors import UsageError
from slm_pl.evaluation._model import device_of, evaluation_mode
from slm_pl.evaluation.efficiency import work as accounts
from slm_pl.evaluation.efficiency.memory import PeakMeter, cache_bytes, free_memory, weight_bytes
from slm_pl.evaluation.efficiency.nvml import GpuFigures, GpuSampler
from slm_pl.evaluation.efficiency.paired import in_turn, paired_of, promise_of, same_layers, time_parts
from slm_pl.evaluation.efficiency.prompts import Prompts
from slm_pl.evaluation.efficiency.protocols import Point, Protocol
from slm_pl.evaluation.efficiency.record import (
    EfficiencyResult,
    Limit,
    MachinePeak,
    Memory,
    Paired,
    PeakMemory,
    Promise,
    Runtime,
    Spread,
    Work,
)
from slm_pl.evaluation.efficiency.runs import Runner, Switches, Times, as_it_was
from slm_pl.quantization import quantization_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Settings:
    """What is equal at all points of a grid.

    Args:
        protocol: Whose rules.
        prompts: What is continued.
        warmup: Runs before counting.
        switches: How models are run.
        seed: Of the first run; each further run adds one. The caller's random state is left alone.
    """

    protocol: Protocol
    prompts: Prompts
    warmup: int
    switches: Switches = Switches()  # noqa: RUF009  frozen
    seed: int = 1234


def check_context(model_name: str, context: object, points: list[Point]) -> None:
    """Refuses points that a model's context cannot hold.

    Args:
        model_name: For the message.
        context: ``max_position_embeddings`` of its config; None if it has no such limit.
        points: With the length of their prompts.

    Raises:
        UsageError: If prompt and answer of one exceed it.
    """
    for point in points:
        assert point.prompt_tokens is not None
        if isinstance(context, int) and point.prompt_tokens + point.new_tokens > context:
            raise UsageError(
                f"Efficiency got a prompt of {point.prompt_tokens} tokens and new_tokens {point.new_tokens}; the "
                f"context of {model_name} holds {context}. Take new_tokens {max(context - point.prompt_tokens, 0)} or "
                "fewer, or a shorter prompt."
            )


def measure_point(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    point: Point,
    settings: Settings,
    peak: MachinePeak,
    step: Callable[[str], None] = lambda _: None,
) -> tuple[EfficiencyResult, GpuFigures | None]:
    """Measures a model alone at one point.

    Args:
        model: A causal language model, on whatever device it is.
        tokenizer: Its tokenizer.
        point: Batch, prompt and length.
        settings: The protocol.
        peak: What the machine can do.
        step: Called after each run.

    Returns:
        The figures, and the GPU's; the latter are None if the model could not run.
    """
    short = _too_large(model, point, settings)
    reason: str | None = f"out of memory: {short}" if short else None
    if reason is None:
        with _prepared(model, tokenizer, point, settings) as runner:
            try:
                return _measured(runner, point, settings, peak, step)
            except Exception as error:
                reason = no_room(error)
                if reason is None:
                    raise
        del runner
    # Behind the block and the handler, which hold on to what did not fit.
    _free(device_of(model))
    absent = ("latency_s", "time_to_first_token_s", "output_tokens_per_s", "peak_memory_bytes")
    missing = {name: reason for name in absent if name != "output_tokens_per_s" or point.new_tokens}
    return _result(point, settings, runtime_of(model, point, settings), missing=missing), None


def compare_point(
    baseline: "PreTrainedModel",
    name: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    point: Point,
    settings: Settings,
    step: Callable[[str], None] = lambda _: None,
    counted: Work | None = None,
) -> Paired | str:
    """Runs two models in turn at one point.

    Args:
        baseline: The one that ``model`` is compared with, on the same device and in the same dtype.
        name: What it was loaded from.
        model: The model.
        tokenizer: Of both.
        point: Batch, prompt and length.
        settings: The protocol.
        step: Called after each pair.
        counted: The model's work at this point, where it was counted already.

    Returns:
        The speed-up, or why it could not be measured.
    """
    with (
        _prepared(baseline, tokenizer, point, settings) as theirs,
        _prepared(model, tokenizer, point, settings) as ours,
    ):
        promise: Promise | None = None
        try:
            slower, faster = in_turn(theirs, ours, settings.warmup, point.repeats, settings.seed, step)
        except Exception as error:
            reason = no_room(error)
            if reason is None:
                raise
        else:
            try:
                promise = _promise(theirs, ours, point, settings, counted)
            except Exception as error:
                if no_room(error) is None:
                    raise
            return paired_of(name, baseline, slower, faster, point.batch_size * point.new_tokens, promise)
    del theirs, ours
    _free(device_of(model))
    return f"with both models, {reason}"


def _promise(theirs: Runner, ours: Runner, point: Point, settings: Settings, counted: Work | None) -> Promise:
    parts = None
    if same_layers(theirs.model, ours.model) and not settings.switches.compile:
        short = Runner(
            theirs.model,
            theirs.batch,
            min(point.new_tokens, 16),
            theirs.sampling,
            theirs.switches,
            theirs.pad_token_id,
        )
        parts = time_parts(short, settings.seed)
    own = counted or _work(ours, point, settings)
    return promise_of(theirs.model, ours.model, parts, _work(theirs, point, settings), own)


def runtime_of(model: "PreTrainedModel", point: Point, settings: Settings, compiled: bool = False) -> Runtime:
    """How a model is run at a point.

    Args:
        model: The model.
        point: The point.
        settings: What was asked for.
        compiled: Whether it really ran through ``torch.compile``.
    """
    attention = getattr(model.config, "_attn_implementation", None)
    return Runtime(
        dtype=str(model.dtype).removeprefix("torch."),
        attention=attention,
        sdpa_backend=settings.switches.sdpa_backend if attention == "sdpa" else None,
        cache=settings.switches.cache if point.new_tokens else "dynamic",
        compile=compiled,
        quantization=quantization_of(model.config),
        sampling=settings.protocol.sampling if point.new_tokens else None,
    )


@contextlib.contextmanager
def _prepared(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", point: Point, settings: Settings
) -> Iterator[Runner]:
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    batch = settings.prompts.batch(point.batch_size, None if point.own_text else point.prompt_tokens)
    with evaluation_mode(model), as_it_was(model, settings.switches.compile), torch.random.fork_rng(devices):
        yield Runner(
            model, batch, point.new_tokens, settings.protocol.sampling, settings.switches, tokenizer.pad_token_id
        )


def _measured(
    runner: Runner, point: Point, settings: Settings, peak: MachinePeak, step: Callable[[str], None]
) -> tuple[EfficiencyResult, GpuFigures]:
    model, device = runner.model, device_of(runner.model)
    meter = PeakMeter(device)
    meter.clear()
    for run in range(settings.warmup):
        runner.timed(settings.seed + run)
        step("warm-up")
    meter.reset()
    times: list[Times] = []
    with GpuSampler(device) as sampler:
        for run in range(point.repeats):
            times.append(runner.timed(settings.seed + settings.warmup + run))
            step(f"{times[-1].total:.3g} s")
    found, reason = meter.read()
    tokens = point.batch_size * (point.new_tokens or point.prompt_tokens or 0) * point.repeats
    gpu = sampler.figures(tokens)
    result = replace(
        _result(point, settings, runtime_of(model, point, settings, runner.compiled), times, found, runner.tokens),
        utilisation=gpu.utilisation,
        energy=gpu.energy,
        machine_peak=peak,
        missing={} if found else {"peak_memory_bytes": reason},
    )
    try:
        done = accounts.account(runner, settings.seed)
    except Exception as error:
        lost = no_room(error)
        if lost is None:
            raise
        missing = {**result.missing, **dict.fromkeys(("work", "memory", "limit"), f"while counting, {lost}")}
        return replace(result, missing=missing), gpu
    step("counting")
    work = accounts.work_of(model, point.batch_size, point.prompt_tokens or 0, point.new_tokens, done)
    memory = _memory(model, point, settings, done, found, gpu)
    return replace(result, work=work, memory=memory, limit=_limit(model, result, work, peak)), gpu


def _limit(model: "PreTrainedModel", result: EfficiencyResult, work: Work, peak: MachinePeak) -> Limit:
    assert result.latency_s is not None
    assert result.time_to_first_token_s is not None
    per_token = result.time_per_output_token_s
    return accounts.limit_of(
        work,
        peak,
        accounts.read_weights(model, result.batch_size * result.prompt_tokens),
        result.new_tokens,
        result.time_to_first_token_s.median,
        None if per_token is None else per_token.median,
        result.latency_s.median,
    )


def _work(runner: Runner, point: Point, settings: Settings) -> Work:
    done = accounts.account(runner, settings.seed)
    return accounts.work_of(runner.model, point.batch_size, point.prompt_tokens or 0, point.new_tokens, done)


def _result(
    point: Point,
    settings: Settings,
    runtime: Runtime,
    times: list[Times] | None = None,
    peak: PeakMemory | None = None,
    read: int = 0,
    missing: dict[str, str] | None = None,
) -> EfficiencyResult:
    assert point.prompt_tokens is not None
    new = point.batch_size * point.new_tokens

    def spread(values: list[float]) -> Spread | None:
        return Spread.of(values) if values else None

    times = times or []
    return EfficiencyResult(
        protocol=settings.protocol.name,
        batch_size=point.batch_size,
        prompt_tokens=point.prompt_tokens,
        new_tokens=point.new_tokens,
        warmup=settings.warmup,
        repeats=point.repeats,
        latency_s=spread([one.total for one in times]),
        time_to_first_token_s=spread([one.first for one in times]),
        output_tokens_per_s=spread([new / one.total for one in times if new]),
        peak_memory_bytes=peak,
        time_per_output_token_s=spread([one.per_token for one in times if one.per_token is not None]),
        inter_token_s=spread([seconds for one in times for seconds in one.between]),
        total_tokens_per_s=spread([(read + new) / one.total for one in times]),
        runtime=runtime,
        prompt=_prompt(point, settings),
        missing=missing or {},
    )


def _prompt(point: Point, settings: Settings) -> str:
    """Which text was continued."""
    texts = settings.prompts.texts
    if not point.own_text or texts is None:
        return "prose"
    if list(texts) == [settings.protocol.prompt]:
        return "protocol"
    return f"own {hashlib.sha256(chr(10).join(texts).encode()).hexdigest()[:8]}"


def _memory(
    model: "PreTrainedModel",
    point: Point,
    settings: Settings,
    done: accounts.Account,
    found: PeakMemory | None,
    gpu: GpuFigures,
) -> Memory:
    weights = weight_bytes(model)
    activations = done.peak_bytes - (done.cache_bytes or 0)
    known = weights + done.peak_bytes
    computed = _cache(model, point, settings) if point.new_tokens else None
    return Memory(
        weights=weights,
        activations=activations,
        kv_cache=done.cache_bytes,
        kv_cache_computed=computed,
        other=found.max - known if found is not None and found.max >= known else None,
        process=gpu.process_bytes,
        device=gpu.device_bytes,
    )


def _cache(model: "PreTrainedModel", point: Point, settings: Settings) -> int | None:
    assert point.prompt_tokens is not None
    # The last token is chosen, but never read.
    tokens = point.prompt_tokens + point.new_tokens - 1
    return cache_bytes(model, point.batch_size, tokens, settings.switches.cache == "static")


def _too_large(model: "PreTrainedModel", point: Point, settings: Settings) -> str:
    """Why a point is not even tried: on a CPU, the system would kill the process instead of telling it."""
    if device_of(model).type != "cpu" or not point.new_tokens:
        return ""
    needed, free = _cache(model, point, settings), free_memory()
    if needed is None or free is None or needed <= free:
        return ""
    return f"the key/value cache alone takes {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free"


# What libraries beneath torch say without torch's own exception.
_FULL = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA out of memory",
    "MPS backend out of memory",
)
_NO_KERNEL = ("No available kernel", "No viable backend")


def no_room(error: BaseException) -> str | None:
    """Why a point cannot be measured: the memory is full, or no kernel that was allowed can do it.

    Returns:
        The reason; None if the error says something else.
    """
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    if is_memory_full(error):
        return f"out of memory: {said}"
    if isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _NO_KERNEL):
        return f"sdpa_backend has no kernel for this: {said}"
    return None


def is_memory_full(error: BaseException) -> bool:
    """Whether an error says that there is no more memory; not all libraries have torch's exception for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _FULL)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
