"""What the demo does, without a page: models that complete prompts for several people at once.

A model has one request at a time; the others wait in a line. It is only read: sampling draws from a generator of its
own, so that neither another model nor another person's request changes what comes out.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from slm_pl.compression.architecture import context_length, num_layers
from slm_pl.compression.plan import count_parameters
from slm_pl.demo.line import Line
from slm_pl.demo.markup import readable
from slm_pl.demo.runs import Run, Settings
from slm_pl.errors import UsageError
from slm_pl.evaluation.efficiency.clock import finish
from slm_pl.evaluation.efficiency.measuring import is_memory_full
from slm_pl.evaluation.efficiency.memory import cache_bytes, weight_bytes
from slm_pl.loading import DType, Source, load_model, load_tokenizer, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHOWN_EVERY = 0.05  # seconds


@dataclass(frozen=True)
class Waiting:
    """The request stands in line.

    Args:
        ahead: How many are served before.
    """

    ahead: int


@dataclass(frozen=True)
class Writing:
    """What there is so far.

    Args:
        text: The completion, without the prompt and without special tokens.
        tokens: How many tokens were made.
        first_s: Seconds from the start of the work to the first token, waiting not included; None before.
        seconds: From the start of the work to the newest token.
    """

    text: str
    tokens: int
    first_s: float | None
    seconds: float

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens in a second, the first and the prompt's work included."""
        return self.tokens / self.seconds if self.tokens and self.seconds > 0 else None


@dataclass(frozen=True)
class Finished(Writing):
    """The end.

    Args:
        stopped: Whether the person ended it.
        prompt_tokens: How many the prompt has.
        cache_bytes: Of keys and values of prompt and completion, by arithmetic; None if the architecture is not known.
    """

    stopped: bool
    prompt_tokens: int
    cache_bytes: int | None


@dataclass(frozen=True)
class Failed:
    """There is no completion, or no more of it.

    Args:
        reason: What a person can read.
    """

    reason: str


Event = Waiting | Writing | Finished | Failed


class DemoModel:
    """A model with its line.

    Args:
        label: The column's name.
        model: The model, on the device where it works; it is only read.
        tokenizer: Its own.
        directory: Where its export is, if it was read from a directory.
    """

    def __init__(
        self,
        label: str,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        directory: Path | None = None,
    ) -> None:
        self.label = label
        self.directory = directory
        self.parameters = count_parameters(model)
        self.num_layers = num_layers(model)
        self.weight_bytes = weight_bytes(model)
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._line = Line(label)

    @classmethod
    def load(cls, label: str, source: Source, dtype: DType, device: torch.device) -> "DemoModel":
        """Reads a model.

        Raises:
            UsageError: As :func:`slm_pl.loading.load_model`; or if it does not fit on the device.
        """
        tokenizer = load_tokenizer(source)
        try:
            model = load_model(source, dtype).to(device)  # type: ignore[arg-type]
        except (RuntimeError, MemoryError, ValueError) as error:
            # ValueError: some kinds of quantised weights are not moved.
            if is_memory_full(error):
                raise UsageError(
                    f"{source.pretrained} does not fit into the memory of {device} beside what is there. Leave models "
                    "out, give --dtype bfloat16, or another --device."
                ) from error
            raise UsageError(f"{source.pretrained} cannot be used on {device}: {failure(error)}.") from error
        return cls(label, model, tokenizer, source.directory)

    @property
    def device(self) -> torch.device:
        """Where it works."""
        return self._model.device

    @property
    def dtype(self) -> str:
        """Of the weights, such as ``float32``."""
        return str(self._model.dtype).removeprefix("torch.")

    def complete(self, run: Run) -> Iterator[Event]:
        """Completes a prompt.

        Whoever stops to iterate before the end stops the work with it.

        Args:
            run: What to do.

        Yields:
            The places in line, the growing text, and the end: :class:`Finished` or :class:`Failed`. Nothing follows
            once the run is superseded.
        """
        # The tokenizer too is used by one thread at a time: by none before the model's turn.
        lines = [run.turns, self._line] if run.settings.in_turn else [self._line]
        places: list[tuple[Line, object]] = []
        try:
            # Nobody who has a model waits for a turn, so all will come to theirs.
            for line in lines:
                places.append((line, line.join()))
                for ahead in line.wait(places[-1][1], run.stop):
                    yield Waiting(ahead)
            if run.stop.is_set():
                event: Event = Finished("", 0, None, 0.0, stopped=True, prompt_tokens=0, cache_bytes=None)
                yield from () if run.superseded else (event,)
                return
            for event in self._write(run):
                if not run.superseded:
                    yield event
        except UsageError as error:
            if not run.superseded:
                yield Failed(str(error))
        finally:
            for line, place in reversed(places):
                line.leave(place)

    def _write(self, run: Run) -> Iterator[Event]:
        from transformers import TextIteratorStreamer

        ids = self._read(run)
        watch = _Watch([run.stop, abandoned := threading.Event()], self._model.device)
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        ended: list[Tensor | Failed] = []

        def work() -> None:
            try:
                ended.append(self._generate(ids, run.settings, watch, streamer))
            except Exception as error:  # noqa: BLE001 - whatever a model fails with, its column says so
                # Not the error itself: its frames hold what was in memory, and this list.
                ended.append(Failed(_reason(error)))
            finally:
                # Also where the streamer itself failed: whoever reads it must come to an end.
                streamer.text_queue.put(streamer.stop_signal)

        thread = threading.Thread(target=work, name=f"demo {self.label}", daemon=True)
        watch.begin()
        thread.start()
        text, shown = "", time.perf_counter()
        try:
            for piece in streamer:
                text += piece
                if piece and time.perf_counter() - shown >= _SHOWN_EVERY:
                    yield watch.writing(text)
                    shown = time.perf_counter()
        finally:
            # The model's next request must not begin before this one is out of it, also where nobody reads to the end.
            abandoned.set()
            thread.join()
        (outcome,) = ended
        if isinstance(outcome, Failed):
            yield outcome
            return
        new = outcome[0, ids["input_ids"].shape[1] :]
        # Not what was streamed: a tokenizer may write tokens otherwise when it sees what follows.
        text = str(self._tokenizer.decode(new, skip_special_tokens=True))
        last = watch.writing(text)
        yield Finished(
            last.text,
            last.tokens,
            last.first_s,
            last.seconds,
            stopped=run.stop.is_set(),
            prompt_tokens=ids["input_ids"].shape[1],
            cache_bytes=cache_bytes(self._model, 1, outcome.shape[1] - 1),
        )

    def _read(self, run: Run) -> dict[str, Tensor]:
        found = self._tokenizer(readable(run.prompt), return_tensors="pt", return_token_type_ids=False)
        tokens = found["input_ids"].shape[1]
        if not tokens:
            raise UsageError("The tokenizer makes no token of this prompt. Type some text.")
        context, new = context_length(self._model.config), run.settings.new_tokens
        if context is not None and tokens + new > context:
            room = context - new
            fix = f"Shorten the prompt to {room:,} tokens" if room > 0 else f"Take fewer than {context:,} new tokens"
            raise UsageError(
                f"The prompt has {tokens:,} tokens, and {new:,} new ones are asked for; {self.label} holds "
                f"{context:,}. {fix}{', or take fewer new tokens' * (room > 0)}. Nothing was cut."
            )
        return {name: value.to(self._model.device) for name, value in found.items()}

    @torch.inference_mode()
    def _generate(self, ids: dict[str, Tensor], settings: Settings, watch: "_Watch", streamer: object) -> Tensor:
        processors = LogitsProcessorList()
        if settings.temperature > 0:
            processors.append(Draw(settings.temperature, settings.seed))
        # The defaults are named too, so that a checkpoint's own settings do not decide; see evaluation.generation.
        output = self._model.generate(
            **ids,
            max_new_tokens=settings.new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([watch]),
            streamer=streamer,
        )
        return cast(Tensor, output)


class Draw(LogitsProcessor):
    """Makes the most likely token a drawn one, with noise of its own generator.

    The place of the largest of ``logits / temperature`` plus independent Gumbel noise has the distribution
    ``softmax(logits / temperature)`` (Gumbel, 1954; Maddison et al., `arXiv:1411.0030`). Transformers' own sampling
    draws from the generator that all threads share.

    Args:
        temperature: Above 0.
        seed: Of the noise, which is drawn on the CPU, so that no device changes it.
    """

    def __init__(self, temperature: float, seed: int) -> None:
        self._temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leaves one token of logits ``[batch, vocabulary]``: the others become minus infinity."""
        noise = torch.empty(scores.shape, dtype=torch.float64).exponential_(generator=self._generator).log_().neg_()
        # On the CPU: not every device computes in float64.
        drawn = (scores.cpu().double() / self._temperature + noise).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn.to(scores.device), 0.0)


class _Watch(StoppingCriteria):
    """Counts tokens, notes when they came, and ends the work when it is to stop."""

    def __init__(self, stops: list[threading.Event], device: torch.device) -> None:
        self._stops = stops
        self._device = device
        self._marks = [0.0]

    def begin(self) -> None:
        self._marks = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        finish(self._device)
        self._marks.append(time.perf_counter())
        stop = any(one.is_set() for one in self._stops)
        return torch.full((input_ids.shape[0],), stop, device=input_ids.device)

    def writing(self, text: str) -> Writing:
        marks = list(self._marks)
        first = marks[1] - marks[0] if len(marks) > 1 else None
        return Writing(text, len(marks) - 1, first, marks[-1] - marks[0])


def _reason(error: Exception) -> str:
    """One line about a failure inside a model."""
    if is_memory_full(error):
        return "Out of memory. Take a shorter prompt or fewer new tokens."
    return f"The model failed: {failure(error)}"


def failure(error: Exception) -> str:
    """The kind of an error, and the beginning of what it says."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}{f': {first[:300]}' if first else ''}"


@dataclass(frozen=True)
class Absent:
    """A model that could not be loaded.

    Args:
        label: The column's name.
        reason: Why.
    """

    label: str
    reason: str

    def complete(self, run: Run) -> Iterator[Event]:
        """Says why there is no completion."""
        yield Failed(self.reason)


def load(
    label: str, pretrained: str, trust_remote_code: bool, dtype: DType, device: torch.device
) -> DemoModel | Absent:
    """Loads a model; the others go on without it where that fails.

    Args:
        label: The column's name.
        pretrained: As for :func:`slm_pl.loading.resolve`.
        trust_remote_code: Run Python code that the checkpoint brings along.
        dtype: Of the weights; ``auto`` is the checkpoint's.
        device: Where to.
    """
    try:
        return DemoModel.load(label, resolve(pretrained, None, trust_remote_code), dtype, device)
    except UsageError as error:
        return Absent(label, str(error).replace("--model.trust_remote_code", "--trust_remote_code"))


def process_memory(device: torch.device) -> str:
    """What this process, with all models and everybody's requests, takes now."""
    parts = []
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmRSS:"):
            parts.append(f"{int(line.split()[1]) / 1024:,.0f} MiB of main memory (resident)")
    if device.type == "cuda":
        parts.append(f"{torch.cuda.memory_allocated(device) / 2**20:,.0f} MiB of {device} (allocated)")
    return " and ".join(parts) or "an amount of memory that this system does not tell"
