"""What is written down of speed, memory, utilisation and work; ``results.json`` holds these fields by their names."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spread:
    """A quantity over the counted runs.

    Args:
        median: The middle one.
        mean: Arithmetic mean.
        stdev: Sample standard deviation; 0 of a single value.
        min: The least.
        max: The greatest.
        p90: 90th percentile, between the two nearest values in proportion; likewise the others.
        p95: 95th percentile.
        p99: 99th percentile.
        n: How many values.
    """

    median: float
    mean: float
    stdev: float
    min: float
    max: float
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    n: int | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarises one or more values."""
        ordered = sorted(values)
        return cls(
            median=statistics.median(ordered),
            mean=statistics.fmean(ordered),
            stdev=statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
            min=ordered[0],
            max=ordered[-1],
            p90=percentile(ordered, 0.90),
            p95=percentile(ordered, 0.95),
            p99=percentile(ordered, 0.99),
            n=len(ordered),
        )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the sorted values lie, interpolated linearly between the two nearest."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class PeakMemory:
    """Most memory in use during the counted runs.

    Args:
        max: Bytes.
        source: What was counted: the allocator's tensors on a GPU, or everything resident of the process on a CPU.
        reserved: Bytes that torch's allocator held on the GPU, the gaps between its tensors among them.
    """

    max: int
    source: str
    reserved: int | None = None


@dataclass(frozen=True)
class Memory:
    """What the peak is made of, in bytes; measured in a run of its own that does not count for speed.

    Args:
        weights: Parameters and buffers, shared ones once, quantised ones as they are stored.
        activations: Peak of all other tensors, without the key/value cache as it is at the end of the run.
        kv_cache: Tensors of the key/value cache at the end of the run; None of a forward pass without one.
        kv_cache_computed: The same by arithmetic: 2 x KV heads x head size x tokens x batch x bytes of a value, summed
            over the layers.
        other: The peak without the three: libraries and the interpreter on a CPU, workspaces of libraries on a GPU.
        process: Of this process on the GPU, by NVML; the CUDA context is part of it.
        device: In use on the whole GPU, by NVML.
    """

    weights: int
    activations: int
    kv_cache: int | None = None
    kv_cache_computed: int | None = None
    other: int | None = None
    process: int | None = None
    device: int | None = None


@dataclass(frozen=True)
class Utilisation:
    """What NVML told of the GPU while the counted runs ran; warm-up is not part of it.

    Args:
        seconds: From the first counted run to the end of the last.
        samples: How many samples fell into them.
        gpu_percent: Share of time in which a kernel ran. It says nothing about how much of the GPU that kernel used:
            the achieved share of the machine's peak does.
        memory_percent: Share of time in which memory was read or written.
        power_w: Watts.
        sm_clock_mhz: Clock of the streaming multiprocessors.
        temperature_c: Degrees Celsius.
    """

    seconds: float
    samples: int
    gpu_percent: Spread | None = None
    memory_percent: Spread | None = None
    power_w: Spread | None = None
    sm_clock_mhz: Spread | None = None
    temperature_c: Spread | None = None


@dataclass(frozen=True)
class Energy:
    """What the GPU took during the counted runs.

    Args:
        joules: Of all counted runs.
        joules_per_token: For each output token or, of a forward pass, for each prompt token.
        source: The GPU's energy counter, or power integrated over time.
    """

    joules: float
    joules_per_token: float
    source: str


@dataclass(frozen=True)
class Work:
    """What a run has to do, counted, not timed. One multiply-accumulate is two floating-point operations.

    Args:
        prefill_macs: Multiply-accumulates of reading the prompts of the batch, attention included.
        decode_macs: Of all further steps of the batch together; 0 of a forward pass.
        macs_per_prompt_token: Of reading one token of a prompt; padding counts as tokens.
        macs_per_output_token: Of making one token, on average over the run; None of a forward pass.
        kv_bytes_per_token: Bytes that one token adds to the key/value cache, in all layers.
        step_bytes: Bytes that one decode step must read at least, on average: the weights once (of an embedding that is
            not also the head, only the rows of its tokens), and the cache.
    """

    prefill_macs: int
    decode_macs: int
    macs_per_prompt_token: float
    macs_per_output_token: float | None
    kv_bytes_per_token: int
    step_bytes: int


@dataclass(frozen=True)
class MachinePeak:
    """What this machine reached in the same run, in the model's dtype.

    Args:
        flops_per_s: Of a large matrix product, two operations for a multiply-accumulate.
        bytes_per_s: Of a large copy, bytes read and bytes written.
        dtype: Of the matrix product.
        matmul: Its shape, such as ``2048 x 2048 x 2048``.
        copy_bytes: Size of what was copied.
    """

    flops_per_s: float
    bytes_per_s: float
    dtype: str
    matmul: str
    copy_bytes: int


@dataclass(frozen=True)
class Limit:
    """The least time that :class:`Work` takes at :class:`MachinePeak`, and how near the medians came to it.

    Args:
        time_to_first_token_s: The greater of the prefill's operations and bytes, each at its peak.
        time_per_output_token_s: Likewise of a decode step; None of a forward pass.
        latency_s: Of the whole run.
        prefill_flops_share: Operations per second of the prefill over the peak (MFU).
        decode_bandwidth_share: Bytes per second of a decode step over the peak.
        latency_share: ``latency_s`` over the median latency: 1 would be the limit itself.
    """

    time_to_first_token_s: float
    time_per_output_token_s: float | None
    latency_s: float
    prefill_flops_share: float | None
    decode_bandwidth_share: float | None
    latency_share: float | None


@dataclass(frozen=True)
class Runtime:
    """What ran; figures of two runtimes do not stand in one row, but for the quantisation of weights.

    Args:
        dtype: Of weights and activations.
        attention: Implementation of attention in transformers, such as ``sdpa``.
        sdpa_backend: Which kernels of scaled dot-product attention were allowed; None for torch's own choice, and where
            attention does not use it.
        cache: Key/value cache: ``dynamic`` or ``static``; a forward pass has none, and says ``dynamic``.
        compile: Whether decode steps (or the forward pass) ran through ``torch.compile``; transformers may decline.
        quantization: Of the weights, such as ``int8 weight-only (torchao)``; None for none.
        sampling: How the next token was chosen: ``sampled`` or ``greedy``; None of a forward pass.
    """

    dtype: str
    attention: str | None = None
    sdpa_backend: str | None = None
    cache: str = "dynamic"
    compile: bool = False
    quantization: str | None = None
    sampling: str | None = None


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the baseline, from pairs of runs.

    Args:
        value: Median of the pairs' ratios, baseline's seconds over this model's.
        low: Lower end of its confidence interval, from order statistics: it assumes no distribution.
        high: Upper end.
        confidence: Probability that the interval covers the median, at least 0.95 from 6 pairs on.
        pairs: How many pairs.
    """

    value: float
    low: float
    high: float
    confidence: float
    pairs: int


@dataclass(frozen=True)
class Promise:
    """The speed-up that there is to expect, by several accounts.

    Times of a layer and of the head are taken by hooks in uncompiled runs of at most 16 new tokens. They are absent
    where they say nothing: of layers that differ in width or in the bits of their weights, and of compiled runs.

    Args:
        layers: Decoder layers of the baseline over those of this model.
        prefill_layer_times: ``(n t + h) / (m t + h)`` with the baseline's own time t of a layer and h of its head in
            the prefill, n and m being the layers of both.
        decode_layer_times: The same of decode steps; None of a forward pass.
        prefill_macs: Ratio of the multiply-accumulates of the prefill.
        decode_bytes: Ratio of the bytes that a decode step reads; None of a forward pass.
    """

    layers: float
    prefill_layer_times: float | None
    decode_layer_times: float | None
    prefill_macs: float
    decode_bytes: float | None


@dataclass(frozen=True)
class Paired:
    """Both models in one process, run in turn, so that what disturbs one disturbs the other.

    Args:
        baseline: What the other model was loaded from.
        num_layers: Its decoder layers.
        num_parameters: Its parameters.
        latency: How many times as fast this model is.
        time_to_first_token: The same of the prefill.
        time_per_output_token: The same of a decode step; None of a forward pass.
        baseline_latency_s: Seconds of the baseline in these runs.
        latency_s: Seconds of this model in these runs.
        promise: What there is to expect; None if the memory did not suffice for counting.
        time_to_first_token_s: As ``latency_s``, of the prefill.
        baseline_time_to_first_token_s: As ``baseline_latency_s``, of the prefill.
        output_tokens_per_s: Of this model in these runs; None of a forward pass.
        baseline_output_tokens_per_s: Of the baseline.
    """

    baseline: str
    num_layers: int
    num_parameters: int
    latency: Ratio
    time_to_first_token: Ratio
    time_per_output_token: Ratio | None
    baseline_latency_s: Spread
    latency_s: Spread
    promise: Promise | None
    time_to_first_token_s: Spread | None = None
    baseline_time_to_first_token_s: Spread | None = None
    output_tokens_per_s: Spread | None = None
    baseline_output_tokens_per_s: Spread | None = None


@dataclass(frozen=True)
class EfficiencyResult:
    """Speed and memory at one point of a grid, with the protocol; figures of two protocols do not compare.

    Args:
        protocol: Whose rules: sampling, warm-up and, unless ``prompt`` says otherwise, prompts. The point may be
            another than the published ones.
        batch_size: Prompts at once.
        prompt_tokens: Tokens of one prompt, padding included where they differ in length.
        new_tokens: Tokens generated for each prompt, exactly; 0 for one forward pass over the prompts.
        warmup: Runs before counting.
        repeats: Counted runs.
        latency_s: Seconds of a whole run, prefill and decode. None with the reason in ``missing`` if the memory did not
            suffice; then the other figures are absent, too.
        time_to_first_token_s: Seconds from the call until the first new token is chosen; of a forward pass, its
            latency.
        output_tokens_per_s: ``batch_size * new_tokens / latency`` of each run; its mean is the published throughput.
            None of a forward pass.
        peak_memory_bytes: Peak memory, or None with the reason in ``missing``.
        time_per_output_token_s: Seconds of a decode step, the mean over each run: ``(latency - time to first token) /
            (new_tokens - 1)``. None with fewer than 2 new tokens.
        inter_token_s: Seconds between two tokens of a run, over the tokens of all runs: its percentiles show stalls.
        total_tokens_per_s: As ``output_tokens_per_s``, prompt tokens counted, too, but not their padding.
        memory: What the peak is made of.
        utilisation: Of the GPU; absent elsewhere.
        energy: Of the GPU; absent elsewhere.
        work: What had to be done.
        machine_peak: What the machine can do.
        limit: The least time for that work on that machine.
        runtime: How the model was run.
        paired: Speed-up over a baseline that ran in turn with this model.
        prompt: ``protocol`` for the protocol's own text, ``prose``, or ``own`` and a hash of the user's texts.
        missing: Reason of each figure that could not be measured.
    """

    protocol: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    warmup: int
    repeats: int
    latency_s: Spread | None
    time_to_first_token_s: Spread | None
    output_tokens_per_s: Spread | None
    peak_memory_bytes: PeakMemory | None
    time_per_output_token_s: Spread | None = None
    inter_token_s: Spread | None = None
    total_tokens_per_s: Spread | None = None
    memory: Memory | None = None
    utilisation: Utilisation | None = None
    energy: Energy | None = None
    work: Work | None = None
    machine_peak: MachinePeak | None = None
    limit: Limit | None = None
    runtime: Runtime | None = None
    paired: Paired | None = None
    prompt: str | None = None
    missing: dict[str, str] = field(default_factory=dict)
