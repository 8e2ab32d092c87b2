"""Speed, memory and outcome of LoRA recovery on SmolLM2-135M: ``python -m tests.benchmarks.recovery --rows FILE``.

One epoch of this project's training runs against one of a straightforward program, written here on its own, that does
as the published recovery programs do (``post_training.py`` of LLM-Pruner, taken over by Shortened LLaMA):
``transformers.Trainer`` and PEFT, micro-batches of 4 rows in random order, padded on the left to their longest and to a
multiple of 8, logits for every position. Both train the same adapters (r 8, alpha 16, dropout 0.05, all projections) on
the same token ids, in float32, with AdamW, a linear warm-up and decay, gradients clipped at 1, and as many rows in an
optimizer step. There is no saving and no evaluation meanwhile, and the published warm-up of 100 steps is cut to 2.

* *Useful tokens per second* are tokens of the rows, padding excluded, by the wall time from the end of the first
  optimizer step, the warm-up, to the end of the last. Each run has a process of its own; the programs take turns.
* *Work* is counted by PyTorch in the warm-up step, by position, and multiplied by the positions of the epoch. The least
  is a product with each frozen weight forward and one back, with each adapter weight one more, for the tokens alone,
  and with the head where a label is predicted; without attention.
* *Validation loss* is one function for both: the mean over response tokens, one row at a time.
* *Peak memory* is measured as in ``tests.benchmarks.search``, on the longest rows, which a long run meets sooner or
  later: two optimizer steps, so that AdamW's moments are there, of two micro-batches each.
"""

import argparse
import logging
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import lightning.pytorch as pl
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.table import Table
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode, aten
from transformers import PreTrainedModel

from slm_pl.data import AlpacaDataModule
from slm_pl.data.training import Examples
from slm_pl.loading import load_model, load_tokenizer, resolve
from slm_pl.module import CausalLM, LoRA
from tests.benchmarks.search import MB, MODEL, QUIET, Check, Memory, Stopwatch, console, memory_of, percent, run_parts
from tests.helpers.run import make_trainer

LEAST_SPEED_UP, MOST_LOSS_DIFFERENCE = 1.4, 0.02
MICRO_BATCH, CUTOFF, LEARNING_RATE, WARMUP_STEPS, CLIP, SEED = 4, 256, 1e-4, 2, 1.0, 1234
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Settings:
    """Source of the rows, as :class:`AlpacaDataModule` takes it; rows of the epoch, for validation, and of a step."""

    path: str
    train_rows: int
    val_rows: int
    batch: int

    def data(self) -> tuple[AlpacaDataModule, Examples]:
        """This project's data module, and the token ids that both programs train on."""
        data = AlpacaDataModule(
            self.path,
            batch_size=MICRO_BATCH,
            global_batch_size=self.batch,
            batching="packed",
            cutoff=CUTOFF,
            val_size=self.val_rows,
            max_rows=self.train_rows + self.val_rows,
            seed=SEED,
        )
        data.trainer = cast(Any, SimpleNamespace(lightning_module=CausalLM(MODEL)))  # whose tokenizer it uses
        return data, data.load_examples()


# PyTorch's counter knows attention on GPUs only. Two products of every query with every key forward, five backward; the
# CPU's kernel leaves out none of them where there is a mask. Shapes are [batch, heads, length, width].
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 2 * 2 * q.numel() * k[2],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, *__, **___: 5 * 2 * q.numel() * k[2],
}


@dataclass
class Meter:
    """Counts while a program trains.

    Attributes:
        tokens: Tokens so far, padding excluded; the programs add them.
        positions: Positions that went through the decoder layers; ``head``: through the language-model head.
        steps: Time, tokens and positions at the end of each optimizer step.
        operations: Floating-point operations of the first one.
    """

    tokens: int = 0
    positions: int = 0
    head: int = 0
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    operations: int = 0

    def watch(self, model: PreTrainedModel) -> None:
        """Counts what goes through this model, adapters in it or not, until this process ends."""
        counter = FlopCounterMode(display=False, custom_mapping=cast(Any, ATTENTION))

        def embedded(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.positions += args[0].numel()

        def projected(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.head += args[0].shape[:-1].numel()

        def stepped(*_: object) -> None:
            if not self.steps:
                counter.__exit__(None, None, None)
                self.operations = counter.get_total_flops()
            self.steps.append((time.perf_counter(), self.tokens, self.positions))

        model.get_input_embeddings().register_forward_pre_hook(embedded)
        model.get_output_embeddings().register_forward_pre_hook(projected)
        register_optimizer_step_post_hook(stepped)
        counter.__enter__()


def train_as_published(base: PreTrainedModel, examples: Examples, settings: Settings, meter: Meter) -> PeftModel:
    """Trains adapters as the published programs do; nothing of slm_pl's module, batches or loss is used here."""
    tokenizer = load_tokenizer(resolve(MODEL))
    tokenizer.padding_side = "left"
    transformers.set_seed(SEED)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = cast(PeftModel, get_peft_model(base, config))
    model.config.use_cache = False

    def seen(_: nn.Module, __: tuple[object, ...], inputs: dict[str, Tensor]) -> None:
        meter.tokens += int(inputs["attention_mask"].sum())

    handle = model.register_forward_pre_hook(seen, with_kwargs=True)
    with tempfile.TemporaryDirectory() as directory:
        trainer = transformers.Trainer(
            model=model,
            train_dataset=cast(Any, [{name: row[name] for name in ("input_ids", "labels")} for row in examples.train]),
            args=transformers.TrainingArguments(
                output_dir=directory,
                per_device_train_batch_size=MICRO_BATCH,
                gradient_accumulation_steps=settings.batch // MICRO_BATCH,
                warmup_steps=WARMUP_STEPS,
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                max_grad_norm=CLIP,
                optim="adamw_torch",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                seed=SEED,
            ),
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, padding=True),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    handle.remove()
    return model


def train_with_lightning(base: PreTrainedModel, examples: Examples, settings: Settings, meter: Meter) -> PeftModel:
    """Trains adapters with this project."""

    class Seen(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, _: int) -> None:
            meter.tokens += int(batch["attention_mask"].sum())

    pl.seed_everything(SEED, verbose=False)
    module = CausalLM(MODEL, dtype="float32", lora=LoRA(), learning_rate=LEARNING_RATE, warmup_steps=WARMUP_STEPS)
    module.model = base
    data = settings.data()[0]
    data.examples = examples
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(Path(directory), Seen(), max_steps=-1, max_epochs=1, gradient_clip_val=CLIP)
        trainer.fit(module, data)
    return cast(PeftModel, module.model)


TRAIN = {"slm_pl": train_with_lightning, "published": train_as_published}


@torch.no_grad()
def validation_loss(model: nn.Module, examples: Examples) -> float:
    """Mean negative log-likelihood of the response tokens."""
    model.eval()
    total, counted = 0.0, 0
    for row in examples.val:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].float()
        labels = torch.tensor(row["labels"][1:])
        total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()  # -100 is left out
        counted += int((labels != -100).sum())
    return total / counted


@dataclass(frozen=True)
class Outcome:
    """One run: seconds after the warm-up step and useful tokens in them; the others are of the whole epoch."""

    seconds: float
    tokens: int
    positions: int
    head: int
    operations: float
    other_load: float | None
    loss: float


def run_once(side: str, settings: Settings) -> Outcome:
    """Trains one epoch; to be called in a fresh process."""
    base, meter, (_, examples) = load_model(resolve(MODEL), dtype="float32"), Meter(), settings.data()
    meter.watch(base)
    with Stopwatch() as watch:
        model = TRAIN[side](base, examples, settings, meter)
    positions, head = meter.positions, meter.head
    assert meter.tokens == sum(examples.train["length"]), "a token was left out, or seen twice"
    (start, before, warm), (end, tokens, _) = meter.steps[0], meter.steps[-1]
    operations, loss = meter.operations / warm * positions, validation_loss(model, examples)
    return Outcome(end - start, tokens - before, positions, head, operations, watch.other_load, loss)


def probe_memory(side: str, settings: Settings) -> Memory:
    """Peak memory above the weights, with the longest rows; to be called in a fresh process."""
    base, (_, examples) = load_model(resolve(MODEL), dtype="float32"), settings.data()
    settings = replace(settings, batch=2 * MICRO_BATCH)
    longest = examples.train.sort("length", reverse=True)
    examples = replace(examples, train=longest.select(range(min(2 * settings.batch, len(longest)))))
    return memory_of(base, lambda: TRAIN[side](base, examples, settings, Meter()).unload())


def untrained(settings: Settings) -> dict[str, float]:
    """The validation loss without training, and the least that the rows need; to be called in a fresh process."""
    base, (_, examples) = load_model(resolve(MODEL), dtype="float32"), settings.data()
    tokens, labels = sum(examples.train["length"]), sum(examples.train["counted"])
    head = base.get_output_embeddings().weight.numel()
    maps = [m for n, m in base.named_modules() if n.rpartition(".")[2] in PROJECTIONS]
    weights = sum(m.weight.numel() for m in maps) * 4 + sum(m.in_features + m.out_features for m in maps) * 8 * 6
    least = tokens * weights + labels * 4 * head
    return {"loss": validation_loss(base, examples), "tokens": tokens, "labels": labels, "operations": least}


def quiet() -> None:
    """Turns off what libraries tell of each run."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def in_fresh_process(function: Callable[..., Any], *arguments: object) -> Any:
    """Runs a function where nothing ran before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), quiet) as pool:
        return pool.submit(function, *arguments).result()


def recovery(settings: Settings, repeats: int) -> tuple[list[Check], dict[str, object]]:
    """Runs both programs in turn and compares them."""
    rows = in_fresh_process(untrained, settings)
    runs: dict[str, list[Outcome]] = {side: [] for side in TRAIN}
    for _ in range(repeats):
        for side, done in runs.items():
            done.append(in_fresh_process(run_once, side, settings))
    memory: dict[str, Memory] = {side: in_fresh_process(probe_memory, side, settings) for side in TRAIN}
    ours, published = (done[0] for done in runs.values())  # positions and operations are the same in every run
    speeds = {side: [run.tokens / run.seconds for run in done] for side, done in runs.items()}
    speed, published_speed = (statistics.median(values) for values in speeds.values())
    loss, published_loss = (statistics.fmean(run.loss for run in done) for done in runs.values())
    peak, most = (measured.peak for measured in memory.values())
    allowed, tokens = published.operations / ours.operations, rows["tokens"]

    table = Table("Figure", *TRAIN, "limit", title=f"LoRA, {settings.train_rows} rows, {settings.batch} a step")

    def row(name: str, show: Callable[[list[Outcome]], str], limit: str = "") -> None:
        table.add_row(name, *(show(done) for done in runs.values()), limit)

    table.add_row("useful tokens/s (median)", f"{speed:.1f}", f"{published_speed:.1f}", f"{allowed:.2f} x by work")
    table.add_row("best", *(f"{max(values):.1f}" for values in speeds.values()))
    row("seconds; useful tokens", lambda d: f"{' '.join(f'{run.seconds:.1f}' for run in d)}; {d[0].tokens:,}")
    row("positions in layers", lambda d: f"{d[0].positions:,}", f"{tokens:,} tokens")
    row("of them padding", lambda d: f"{d[0].positions - tokens:,}, {1 - tokens / d[0].positions:.1%}", "0")
    row("positions in the head", lambda d: f"{d[0].head:,}", f"{rows['labels']:,} labels")
    row("TFLOPs", lambda d: f"{d[0].operations / 1e12:.2f}", f"{rows['operations'] / 1e12:.2f} without attention")
    row("validation loss", lambda d: " ".join(f"{run.loss:.4f}" for run in d), f"{rows['loss']:.4f} untrained")
    table.add_row("peak above weights", *(f"{m.peak / MB:,.0f} MB" for m in memory.values()))
    table.add_row("of it live tensors", *(f"{m.tensors / MB:,.0f} MB" for m in memory.values()))
    row("other load meanwhile", lambda d: " ".join(percent(run.other_load) for run in d))
    console.print(table)
    if max(run.other_load or 0.0 for done in runs.values() for run in done) > QUIET:
        console.print("[yellow]Other programs kept the machine busy: do not trust the wall times, run again.[/]")
    faster, worse = speed / published_speed, loss / published_loss - 1
    value = f"{loss:.4f}, {worse:+.2%}; fell by {rows['loss'] - loss:.4f} and {rows['loss'] - published_loss:.4f}"
    limit = f"within {MOST_LOSS_DIFFERENCE:.0%} of {published_loss:.4f}"
    speed_up = f"{faster:.2f} x ({allowed:.2f} x less work)"
    checks = [
        Check("speed-up in useful tokens/s", speed_up, f">= {LEAST_SPEED_UP:g} x", faster >= LEAST_SPEED_UP),
        Check("validation loss after the same rows", value, limit, abs(worse) <= MOST_LOSS_DIFFERENCE),
        Check("peak memory above the weights", f"{peak / MB:,.0f} MB", f"<= {most / MB:,.0f} MB", peak <= most),
    ]
    figures = {side: {"runs": [asdict(r) for r in runs[side]], "memory": asdict(memory[side])} for side in TRAIN}
    return checks, {"settings": asdict(settings), "rows": rows, **figures}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark from the command line; exit code 1 if a check failed, 2 if it could not run."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.recovery", description="Speed, memory and outcome of LoRA recovery."
    )
    parser.add_argument("--rows", default="embedded", metavar="FILE", help="instruction rows (%(default)s)")
    parser.add_argument("--train-rows", type=int, default=200, help="rows of the epoch (%(default)s)")
    parser.add_argument("--val-rows", type=int, default=40, help="rows for the validation loss (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="rows of an optimizer step (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each program (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    if options.batch % MICRO_BATCH or not 0 < options.batch < options.train_rows or options.repeats < 1:
        parser.error(f"--batch takes a multiple of {MICRO_BATCH}, --train-rows more than that, --repeats at least 1")
    settings = Settings(options.rows, options.train_rows, options.val_rows, options.batch)
    return run_parts({"recovery": lambda: recovery(settings, options.repeats)}, None, options.json)


if __name__ == "__main__":
    sys.exit(main())
