"""Distance from the dense model on held-out text, as a test hook."""

import contextlib
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks.base import EarlyCheck, PlanObserver
from slm_pl import identity, loading
from slm_pl.compression.architecture import num_layers
from slm_pl.compression.plan import Plan, count_parameters
from slm_pl.data import EvaluationText, load_evaluation
from slm_pl.errors import UsageError
from slm_pl.evaluation._ranks import agreed
from slm_pl.evaluation.drift import DriftResult, OutputHead, Reference, drift, reference_states
from slm_pl.evaluation.windows import Windows
from slm_pl.module import CausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MISSING = "drift"


class Drift(PlanObserver, EarlyCheck):
    """Compares the next-token distributions of a compressed model with those of the dense one in ``test``.

    Adds to ``results.json``, once for each text: the mean of KL(dense || compressed), in nats, and the share of
    positions where both think the same token likeliest. They need no labels, and show a difference where perplexity and
    accuracy, in which losses and gains cancel, do not (Dutta et al., https://arxiv.org/abs/2407.09141)::

        - class_path: callbacks.Drift
          init_args:
            texts: [{source: embedded, sequence_length: 128, max_tokens: 4096}]

    Where a compression callback acts in the same run, the dense model is asked before it is changed. Otherwise the
    model that the first plan was made for is loaded once more, asked, and freed before the measurement; if it is no
    longer there, the record says so. Of the dense model the final hidden states are kept in main memory: tokens x
    hidden size x 2 bytes in 16 bit, and its language-model head. Under several processes each compares its share of the
    windows.

    Args:
        texts: What to compare on, as for ``callbacks.Perplexity``; the default is the embedded held-out text.
        reference: The dense model: a Hub id, a directory, a ``.gguf`` file, or ``package:NAME/FILE.gguf``; null for the
            model that was compressed.
        local_data: As for ``callbacks.Perplexity``.
        batch_size: Windows in one forward pass.

    Raises:
        UsageError: If ``batch_size`` is below 1.
    """

    def __init__(
        self,
        texts: list[EvaluationText] | None = None,
        reference: str | None = None,
        local_data: str | None = None,
        batch_size: int = 4,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"Drift got batch_size {batch_size}; give at least 1.")
        self.texts = [EvaluationText()] if texts is None else texts
        self.reference = reference
        self.local_data = local_data
        self.batch_size = batch_size
        self._windows: list[Windows] | None = None
        self._references: list[Reference] | None = None

    def check(self, trainer: pl.Trainer) -> None:
        """Reads the texts and looks at the reference, so that nothing is missing after a search."""
        if trainer.state.fn != TrainerFn.TESTING or self._windows is not None:
            return
        module = trainer.lightning_module
        assert isinstance(module, CausalLM)
        if self.reference is not None:
            source = loading.resolve(self.reference, None, module.source.trust_remote_code)
            theirs, ours = (_vocabulary(one) for one in (source, module.source))
            if ours != theirs:
                raise UsageError(
                    f"The vocabulary of the reference {self.reference} has {theirs} tokens, that of "
                    f"{module.pretrained} {ours}; it has to be the same one. Give the model that this one was made of, "
                    "or leave reference out."
                )
        self._windows = [load_evaluation(text, module.tokenizer, self.local_data) for text in self.texts]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reads what is needed before any work."""
        self.check(trainer)

    def on_plan(self, trainer: pl.Trainer, pl_module: CausalLM, plan: Plan) -> None:
        """Asks the dense model before its first compression."""
        if trainer.state.fn == TrainerFn.TESTING and self.reference is None and not pl_module.plans:
            self._references = self._ask(pl_module.load_model(), plan.base.pretrained)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compares."""
        assert isinstance(pl_module, CausalLM)
        assert self._windows is not None  # `setup` comes before
        model, results = pl_module.measured()
        if self.reference is None and not pl_module.plans:
            quantised = loading.quantization_of(model.config)
            results.missing[MISSING] = "the dense model itself" + (
                f", but {quantised}: give the model as it was before as reference" if quantised else ""
            )
            return
        dense = self._dense(pl_module)
        for index, (text, windows) in enumerate(zip(self.texts, self._windows, strict=True)):
            corpus = text.protocol().label
            asked = [corpus, windows.sha256, windows.protocol, self.batch_size, *dense]

            def measure(index: int = index, windows: Windows = windows, corpus: str = corpus) -> DriftResult:
                if self._references is None:
                    self._references = self._load(pl_module, model)
                return drift(model, windows, self._references[index], corpus, batch_size=self.batch_size)

            try:
                results.drift.append(pl_module.once(asked, DriftResult, measure))
            except FloatingPointError as error:
                results.missing[f"{MISSING} {corpus} @ {windows.sequence_length}"] = str(error)
            except _Gone as error:
                results.missing[MISSING] = str(error)
                rank_zero_warn(f"Drift was not measured: {error}")
                return

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the texts and the dense model."""
        self._windows = self._references = None

    def _ask(self, dense: "PreTrainedModel", name: str) -> list[Reference]:
        assert self._windows is not None  # `check` comes before any work
        head = OutputHead.of(dense)
        return [reference_states(dense, windows, name, head, self.batch_size) for windows in self._windows]

    def _dense(self, module: CausalLM) -> list[object]:
        """The name of the dense model, and what tells its content."""
        name, revision = self._named(module)
        location = name
        with contextlib.suppress(UsageError):  # it is gone, which the measurement tells
            location = loading.resolve(name, revision).location
        return [name, identity.model_content(location, revision)]

    def _named(self, module: CausalLM) -> tuple[str, str | None]:
        """The dense model and its revision."""
        if self.reference is not None:
            return self.reference, None
        base = module.plans[0].base
        return base.pretrained, base.revision

    def _load(self, module: CausalLM, model: "PreTrainedModel") -> list[Reference]:
        """Loads the dense model in the dtype of the compressed one, asks it and forgets it."""
        base = module.plans[0].base if self.reference is None else None
        name, revision = self._named(module)
        # A plan may be a stranger's: that the user trusts the code of one model does not let it choose another.
        trusted = module.source.trust_remote_code and name in (self.reference, module.pretrained)
        dtype = str(model.dtype).removeprefix("torch.")
        attention = getattr(model.config, "_attn_implementation", None)

        def load() -> "PreTrainedModel":
            source = loading.resolve(name, revision, trusted)
            return loading.load_model(source, dtype, attention)  # type: ignore[arg-type]

        try:
            dense = agreed(load)
        except UsageError as error:
            if base is None:
                raise
            raise _Gone(f"the model that was compressed cannot be loaded. {error}") from error
        size = (num_layers(dense), count_parameters(dense))
        if base is not None and size != (base.num_layers, base.num_parameters):
            raise _Gone(
                f"{name} is another model now: it has {size[0]} layers and {size[1]:,} parameters, the one that was "
                f"compressed had {base.num_layers} and {base.num_parameters:,}. Give that one as reference."
            )
        rank_zero_info(f"Drift: comparing with {name}, {size[1] / 1e6:,.1f} M parameters")
        return self._ask(dense.to(module.device), name)  # type: ignore[arg-type]


class _Gone(Exception):
    """The dense model is no longer there."""


def _vocabulary(source: loading.Source) -> int:
    return int(loading.read_config(source).get_text_config().vocab_size)
