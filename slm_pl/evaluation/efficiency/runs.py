"""One run of a model: generation with a time stamp at every token, or a forward pass."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slm_pl.evaluation._model import device_of
from slm_pl.evaluation.efficiency.clock import clock_of, finish
from slm_pl.evaluation.efficiency.prompts import Batch
from slm_pl.evaluation.efficiency.protocols import Sampling

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig, PreTrainedModel

CacheKind = Literal["dynamic", "static"]
SDPABackend = Literal["flash", "efficient", "cudnn", "math"]
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Switches:
    """How models are run, as the user asks.

    Args:
        cache: Key/value cache: one that grows, or one of full length from the start.
        compile: Run decode steps (or the forward pass) through ``torch.compile``.
        sdpa_backend: Allow these kernels of scaled dot-product attention only.
    """

    cache: CacheKind = "dynamic"
    compile: bool = False
    sdpa_backend: SDPABackend | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of one run.

    Args:
        total: Of the whole call.
        tokens: From the start until each new token was chosen; empty of a forward pass.
    """

    total: float
    tokens: list[float]

    @property
    def first(self) -> float:
        """Until the first new token; of a forward pass, all of it."""
        return self.tokens[0] if self.tokens else self.total

    @property
    def per_token(self) -> float | None:
        """Of a decode step, the mean over the run."""
        return (self.total - self.first) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None

    @property
    def between(self) -> list[float]:
        """From each new token to the next."""
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]


class Runner:
    """Runs one model at one point of a grid, again and again.

    Args:
        model: A causal language model, on whatever device it is, in evaluation mode.
        batch: Its prompts.
        new_tokens: Tokens to generate for each; 0 for a forward pass.
        sampling: How they are chosen: the likeliest, or drawn with top-k 50, top-p 0.95 and temperature 1.
        switches: How it is run.
        pad_token_id: The padding token.

    Attributes:
        tokens: Tokens of all prompts, without padding.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        batch: Batch,
        new_tokens: int,
        sampling: Sampling,
        switches: Switches,
        pad_token_id: int | None,
    ) -> None:
        self.model = model
        self.batch = batch
        self.new_tokens = new_tokens
        self.sampling = sampling
        self.switches = switches
        self.pad_token_id = pad_token_id
        self.tokens = int(batch.mask.sum())
        self._device = device_of(model)
        self._clock = clock_of(self._device)
        self._ids, self._mask = batch.ids.to(self._device), batch.mask.to(self._device)
        self._compiled: Callable[..., object] | None = None
        self._cache: Cache | None = None

    @property
    def compiled(self) -> bool:
        """Whether timed runs went through ``torch.compile``; transformers declines of some models and caches."""
        return self._compiled is not None or "_compiled_call" in vars(self.model)

    def timed(self, seed: int) -> Times:
        """Runs once and takes the time; an accelerator is waited for before and after."""
        torch.manual_seed(seed)
        finish(self._device)
        with self._surroundings():
            cache = self._static_cache()
            marks = [self._clock.mark()]
            if self.new_tokens:
                self._generate(lambda: marks.append(self._clock.mark()), self.switches.compile, cache)
            else:
                self._forward(self.switches.compile)
            marks.append(self._clock.mark())
        *tokens, total = self._clock.seconds(marks)
        return Times(total, tokens)

    def plain(self, seed: int, on_token: Callable[[], None]) -> "Cache | None":
        """Runs once without time stamps and uncompiled.

        Args:
            seed: Of the draws.
            on_token: Called when a new token has been chosen.

        Returns:
            The key/value cache as it is at the end; None of a forward pass.
        """
        torch.manual_seed(seed)
        with self._surroundings():
            if self.new_tokens:
                return self._generate(on_token, compiled=False)
            self._forward(compiled=False)
        return None

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        backend = self.switches.sdpa_backend
        with torch.inference_mode(), sdpa_kernel(_BACKENDS[backend]) if backend else contextlib.nullcontext():
            yield

    def _static_cache(self) -> "Cache | None":
        """An empty static cache, always the same: CUDA graphs keep the addresses that they were recorded with."""
        from transformers import StaticCache

        if self.switches.cache != "static" or not self.new_tokens:
            return None
        if self._cache is None:
            tokens = self._ids.shape[1] + self.new_tokens - 1  # the last one is chosen, but never read
            self._cache = StaticCache(config=self.model.config.get_text_config(decoder=True), max_cache_len=tokens)
        else:
            self._cache.reset()
        return self._cache

    def _forward(self, compiled: bool) -> None:
        call: Callable[..., object] = self.model
        if compiled:
            if self._compiled is None:
                self._compiled = torch.compile(self.model.__call__, dynamic=False)
            call = self._compiled
        call(input_ids=self._ids, attention_mask=self._mask, use_cache=False)

    def _generate(self, on_token: Callable[[], None], compiled: bool, cache: "Cache | None" = None) -> "Cache":
        from transformers import StoppingCriteria, StoppingCriteriaList

        go_on = torch.zeros(len(self._ids), dtype=torch.bool, device=self._device)

        class EveryToken(StoppingCriteria):
            """Never stops; it is asked right after every token."""

            def __call__(
                self, input_ids: Tensor, scores: Tensor, **kwargs: object
            ) -> Tensor:  # transformers' signature
                on_token()
                return go_on

        call = cast("Callable[..., object]", self.model.generate)
        with _own_settings_aside(self.model):
            output = call(
                input_ids=self._ids,
                attention_mask=self._mask,
                generation_config=self._generation_config(compiled, own_cache=cache is None),
                stopping_criteria=StoppingCriteriaList([EveryToken()]),
                past_key_values=cache,
            )
        made = output.sequences.shape[1] - self._ids.shape[1]  # type: ignore[attr-defined]
        if made != self.new_tokens:
            raise RuntimeError(f"{made} tokens were generated in place of {self.new_tokens}")
        return cast("Cache", output.past_key_values)  # type: ignore[attr-defined]

    def _generation_config(self, compiled: bool, own_cache: bool) -> "GenerationConfig":
        from transformers import CompileConfig, GenerationConfig

        drawn = {"top_k": 50, "top_p": 0.95, "temperature": 1.0} if self.sampling == "sampled" else {}
        config = GenerationConfig(
            do_sample=self.sampling == "sampled",
            **drawn,
            use_cache=True,
            min_new_tokens=self.new_tokens,
            max_new_tokens=self.new_tokens,
            pad_token_id=0 if self.pad_token_id is None else self.pad_token_id,
            disable_compile=not compiled,
            return_dict_in_generate=True,
        )
        if self.switches.cache == "static" and own_cache:
            config.cache_implementation = "static"
        if compiled:
            # CUDA graphs, transformers' own choice; there is no such thing on a CPU. And always code for the shapes at
            # hand: after a second batch size, torch would make code for any.
            mode = "reduce-overhead" if self._device.type == "cuda" else "default"
            config.compile_config = CompileConfig(mode=mode, dynamic=False)
            config.compile_config._compile_all_devices = True
        return config


@contextlib.contextmanager
def _own_settings_aside(model: "PreTrainedModel") -> Iterator[None]:
    """Keeps what a checkpoint's own generation_config asks for from changing the protocol; only its EOS stays."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=None if own is None else own.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def as_it_was(model: "PreTrainedModel", compiled: bool = False) -> Iterator[None]:
    """Forgets what generation leaves behind: a static cache's length, and compiled code.

    Args:
        model: What runs.
        compiled: Whether through ``torch.compile``, which remembers code and its shapes for the whole process: at its
            limit it would run further shapes uncompiled.
    """
    try:
        yield
    finally:
        for name in ("_previous_max_cache_length", "_compiled_call", "_last_compile_config"):
            if name in vars(model):
                delattr(model, name)
        if compiled:
            torch.compiler.reset()
