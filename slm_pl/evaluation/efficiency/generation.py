"""Latency, time to first token, throughput and peak memory of text generation."""

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slm_pl.errors import UsageError
from slm_pl.evaluation._model import device_of, evaluation_mode
from slm_pl.evaluation.efficiency.record import EfficiencyResult, PeakMemory, Spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROTOCOL = "shortened_llama"


def check_protocol(batch_size: int, new_tokens: int, warmup: int, repeats: int) -> None:
    """Refuses numbers that :func:`measure_generation` cannot use.

    Raises:
        UsageError: If one is out of range.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("new_tokens", new_tokens, 1),
        ("warmup", warmup, 0),
        ("repeats", repeats, 2),
    ):
        if value < least:
            raise UsageError(f"Efficiency got {name} {value}; allowed is {least} or more.")


def measure_generation(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str = "The Leaning Tower of Pisa is known for",
    batch_size: int = 1,
    new_tokens: int = 128,
    warmup: int = 10,
    repeats: int = 20,
    seed: int = 1234,
    show_progress: bool = True,
) -> EfficiencyResult:
    """Times ``generate`` as Shortened LLaMA's ``gen_batch_eval_time.py`` does (https://arxiv.org/abs/2402.02834).

    Sampling with top-k 50, top-p 0.95 and temperature 1, end-of-sequence suppressed, the timer around the whole call.
    Beyond the original: it also runs on a CPU, every run has its seed, the attention mask is passed, the GPU is waited
    for before each time stamp, and the time to the first token is noted.

    Args:
        model: A causal language model of transformers, plain or wrapped by PEFT, on whatever device it is.
        tokenizer: Its tokenizer.
        prompt: Text to continue, the same for the whole batch.
        batch_size: Copies of the prompt in a batch.
        new_tokens: Tokens to generate for each.
        warmup: Runs that are not counted.
        repeats: Counted runs, at least 2 so that there is a spread.
        seed: Seed of the first run; each run adds one. The caller's random state is left alone.
        show_progress: Draw a progress bar.

    Returns:
        The figures; what could not be measured is absent with a reason.

    Raises:
        UsageError: If a number is out of range, the prompt is empty, or prompt and answer exceed the model's context.
    """
    check_protocol(batch_size, new_tokens, warmup, repeats)
    device = device_of(model)
    encoded = tokenizer([prompt] * batch_size, return_tensors="pt")
    ids, mask = encoded["input_ids"].to(device), encoded["attention_mask"].to(device)
    prompt_tokens = ids.shape[1]
    if prompt_tokens < 1:
        raise UsageError("Efficiency got a prompt without a single token. Give a prompt of at least one word.")
    context = getattr(model.config, "max_position_embeddings", None)
    if isinstance(context, int) and prompt_tokens + new_tokens > context:
        raise UsageError(
            f"Efficiency got a prompt of {prompt_tokens} tokens and new_tokens {new_tokens}; this model's context "
            f"holds {context}. Take new_tokens {max(context - prompt_tokens, 0)} or fewer, or a shorter prompt."
        )

    from rich.progress import track

    generate = _generator(model, tokenizer, ids, mask, new_tokens)
    latency: list[float] = []
    first_token: list[float] = []
    memory = _PeakMemoryMeter(device)
    devices = [device] if device.type == "cuda" else []
    with evaluation_mode(model), torch.inference_mode(), torch.random.fork_rng(devices):
        runs = range(-warmup, repeats)
        for run in track(runs, description=f"Generation, batch {batch_size}", disable=not show_progress):
            if run == 0:
                memory.reset()
            torch.manual_seed(seed + warmup + run)
            _synchronise(device)
            start = time.perf_counter()
            first = generate()
            _synchronise(device)
            end = time.perf_counter()
            if run >= 0:
                latency.append(end - start)
                first_token.append(first - start)

    peak, reason = memory.read()
    return EfficiencyResult(
        protocol=PROTOCOL,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        warmup=warmup,
        repeats=repeats,
        latency_s=Spread.of(latency),
        time_to_first_token_s=Spread.of(first_token),
        output_tokens_per_s=Spread.of([batch_size * new_tokens / seconds for seconds in latency]),
        peak_memory_bytes=peak,
        missing={} if peak else {"peak_memory_bytes": reason},
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _generator(
    model: nn.Module, tokenizer: "PreTrainedTokenizerBase", ids: Tensor, mask: Tensor, new_tokens: int
) -> Callable[[], float]:
    """A function that generates once and returns the time stamp of the first new token."""
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    class FirstToken(StoppingCriteria):
        """Never stops; notes when it is first asked, which is right after the first token."""

        def __init__(self) -> None:
            self.at = 0.0
            self.go_on = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:  # transformers' signature
            if not self.at:
                _synchronise(ids.device)
                self.at = time.perf_counter()
            return self.go_on

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    # The defaults are named too: whatever a checkpoint's own generation_config asks for must not change the protocol.
    config = GenerationConfig(
        do_sample=True,
        top_k=50,
        top_p=0.95,
        temperature=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=pad,
    )
    call = model.generate
    assert callable(call)

    def generate() -> float:
        first = FirstToken()
        output = call(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([first]),
        )
        assert output.shape[1] - ids.shape[1] == new_tokens, "the end-of-sequence token was not suppressed"
        return first.at

    return generate


class _PeakMemoryMeter:
    """Peak memory between ``reset`` and ``read``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reason = f"no peak memory counter for device {device.type!r} on this system"

    def reset(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            # Freed memory that the allocator keeps would count as used; only glibc can be told to give it back.
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            try:
                # Sets the high-water mark of the resident set to its present size: man 5 proc, /proc/pid/clear_refs.
                Path("/proc/self/clear_refs").write_text("5")
                self.reason = ""
            except OSError as error:
                self.reason = f"the process's peak resident set cannot be reset: {error}"

    def read(self) -> tuple[PeakMemory | None, str]:
        if self.device.type == "cuda":
            return PeakMemory(torch.cuda.max_memory_allocated(self.device), "torch.cuda.max_memory_allocated"), ""
        if self.reason:
            return None, self.reason
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return PeakMemory(int(line.split()[1]) * 1024, "process peak resident set (VmHWM)"), ""
        return None, "the system does not report a peak resident set (VmHWM)"
