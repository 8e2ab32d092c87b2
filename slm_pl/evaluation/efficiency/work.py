"""What a run has to do, what the machine can do, and the least time that follows."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from slm_pl.compression.architecture import ARCHITECTURES, idle_expert_bytes
from slm_pl.evaluation.efficiency.clock import finish
from slm_pl.evaluation.efficiency.memory import cache_bytes, free_memory, tensor_bytes, weight_bytes
from slm_pl.evaluation.efficiency.record import Limit, MachinePeak, Work
from slm_pl.evaluation.efficiency.runs import Runner
from slm_pl.memory import TensorBytes, plain_tensors

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class Account:
    """What one run did.

    Args:
        prefill_flops: Operations until the first new token; of a forward pass, all.
        decode_flops: Operations after it.
        peak_bytes: Most bytes of tensors at a time beside the weights, the cache among them.
        cache_bytes: Bytes of the key/value cache at the end; None of a forward pass.
    """

    prefill_flops: int
    decode_flops: int
    peak_bytes: int
    cache_bytes: int | None


def account(runner: Runner, seed: int) -> Account:
    """Runs once under two counters, which makes it slow: of every product's operations, and of every tensor's bytes."""
    unknown = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    experts = [(torch.ops.aten, "_grouped_mm"), (torch.ops.transformers, "grouped_mm_fallback")]
    unknown |= {getattr(module, name): _experts_flops for module, name in experts if hasattr(module, name)}
    prefill = 0
    counter = FlopCounterMode(display=False, custom_mapping=unknown)
    model = runner.model
    with _known_attention(model), _frozen(model), TensorBytes(model) as tensors, counter as flops:

        def on_token() -> None:
            nonlocal prefill
            prefill = prefill or flops.get_total_flops()

        cache = runner.plain(seed, on_token)
    total = flops.get_total_flops()
    prefill = prefill or total
    size = None if cache is None else _measured(cache)
    return Account(prefill, total - prefill, tensors.peak, size)


@contextlib.contextmanager
def _known_attention(model: "PreTrainedModel") -> Iterator[None]:
    """Counts with torch's own attention where the model's is a library's kernel: the operations are the same."""
    own = getattr(model.config, "_attn_implementation", None)
    if own in (None, "sdpa", "eager", "flex_attention"):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Torch's counter looks for the gradient's way through what a module gives, and a bias alone has none."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *args: object, out_shape: object = None, **kwargs: object
) -> int:
    """Operations of attention on a CPU, which torch's counter does not know; as its others, masked ones count, too."""
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[-2] * (size + value[-1])


def _experts_flops(
    rows: torch.Size, weights: torch.Size, *args: object, out_shape: object = None, **kwargs: object
) -> int:
    """Operations of experts, each on its own rows, which torch's counter does not know either."""
    return 2 * rows.numel() * weights[-1]


def _measured(cache: "Cache") -> int:
    layers = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    return sum(
        plain.numel() * plain.element_size()
        for layer in layers
        for tensor in layer
        if tensor is not None
        for plain in plain_tensors(tensor)
    )


def work_of(model: "PreTrainedModel", batch_size: int, prompt_tokens: int, new_tokens: int, done: Account) -> Work:
    """Puts the figures of a run in relation to its tokens."""
    steps = max(new_tokens - 1, 0)
    per_token = cache_bytes(model, 1, 1)
    cached = cache_bytes(model, batch_size, prompt_tokens + (1 + steps) // 2)
    if per_token is None or cached is None:  # an architecture that is not known: from what was measured
        per_token = (done.cache_bytes or 0) // (batch_size * max(prompt_tokens + steps, 1))
        cached = per_token * batch_size * (prompt_tokens + (1 + steps) // 2)
    return Work(
        prefill_macs=done.prefill_flops // 2,
        decode_macs=done.decode_flops // 2,
        macs_per_prompt_token=done.prefill_flops / 2 / (batch_size * prompt_tokens),
        macs_per_output_token=done.decode_flops / 2 / (batch_size * steps) if steps else None,
        kv_bytes_per_token=per_token,
        step_bytes=read_weights(model, batch_size) + cached,
    )


def read_weights(model: "PreTrainedModel", rows: int) -> int:
    """Bytes of the weights that so many tokens must read: all, but only their rows of an embedding that is no head.

    Of the experts, those of one token count: others might choose the same.
    """
    size = weight_bytes(model)
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    assert isinstance(table, torch.Tensor)
    if head is None or head.weight is not table:
        size -= tensor_bytes([table]) * max(len(table) - rows, 0) // len(table)
    return size - (idle_expert_bytes(model) if model.config.model_type in ARCHITECTURES else 0)


def machine_peak(device: torch.device, dtype: torch.dtype) -> MachinePeak:
    """What the machine can do, measured once in a process for each number of threads; see :func:`measure_peak`."""
    return _peak_with(device, dtype, torch.get_num_threads())


@functools.lru_cache
def _peak_with(device: torch.device, dtype: torch.dtype, threads: int) -> MachinePeak:
    return measure_peak(device, dtype)


def measure_peak(device: torch.device, dtype: torch.dtype) -> MachinePeak:
    """Times a large matrix product and a large copy, and takes the best of several.

    The product is as large as takes about a fifth of a second at most; both are smaller where they do not fit beside
    the model.
    """
    most_side = 8192 if device.type != "cpu" else 2048
    # A gibibyte: a server's caches hold a good part of less.
    side, size = 512, 2**30
    while device.type == "cpu" and 4 * size > (free_memory() or 4 * size):
        size //= 2
    with torch.inference_mode():
        while side < most_side and 8 * _product_seconds(side, device, dtype, least=0.0) < 0.2:
            side *= 2
        while True:
            try:
                seconds = _product_seconds(side, device, dtype)
                break
            except torch.OutOfMemoryError:
                side //= 2
        while True:
            try:
                rate = 2 * size / _copy_seconds(size, device)
                break
            except torch.OutOfMemoryError:
                size //= 2
    name = str(dtype).removeprefix("torch.")
    return MachinePeak(2 * side**3 / seconds, rate, name, f"{side} x {side} x {side}", size)


def _product_seconds(side: int, device: torch.device, dtype: torch.dtype, least: float = 0.4) -> float:
    # Not of one value, which a GPU multiplies with less power and so faster; and not of the caller's random state.
    own = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(side, side, device=device, generator=own).to(dtype)
    return _best(lambda: matrix @ matrix, device, least)


def _copy_seconds(size: int, device: torch.device) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _best(lambda: target.copy_(source), device)


def _best(call: Callable[[], object], device: torch.device, least: float = 0.4) -> float:
    """The shortest of the calls that fit into so many seconds, which also bring a GPU to its clock; two at least."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < least:
        finish(device)
        start = time.perf_counter()
        call()
        finish(device)
        times.append(time.perf_counter() - start)
    return min(times)


def limit_of(
    work: Work, peak: MachinePeak, weights: int, new_tokens: int, first: float, per_token: float | None, latency: float
) -> Limit:
    """The least time for some work, and how near it was: the roofline model (Williams et al., 2009).

    Args:
        work: What had to be done.
        peak: What the machine can do.
        weights: Bytes of the weights that the prefill reads at least.
        new_tokens: Of each prompt.
        first: Median seconds to the first token.
        per_token: Median seconds of a decode step.
        latency: Median seconds of a run.
    """
    prefill = max(2 * work.prefill_macs / peak.flops_per_s, weights / peak.bytes_per_s)
    steps = max(new_tokens - 1, 0)
    step = None
    if steps:
        step = max(2 * work.decode_macs / steps / peak.flops_per_s, work.step_bytes / peak.bytes_per_s)
    whole = prefill + steps * (step or 0.0)
    return Limit(
        time_to_first_token_s=prefill,
        time_per_output_token_s=step,
        latency_s=whole,
        prefill_flops_share=2 * work.prefill_macs / first / peak.flops_per_s,
        decode_bandwidth_share=None if per_token is None else work.step_bytes / per_token / peak.bytes_per_s,
        latency_share=whole / latency,
    )
