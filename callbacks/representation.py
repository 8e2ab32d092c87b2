"""Similarity of a model's layers to each other, as a test hook."""

import json
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks.base import EarlyCheck, PlanObserver, on_first_rank
from slm_pl import files
from slm_pl.compression.architecture import num_layers
from slm_pl.compression.plan import MergeLayers, Plan, layer_groups
from slm_pl.compression.scores import LEAST_TOKENS, Kernel
from slm_pl.data import CalibrationSet, CalibrationText, TrainingData, load_calibration
from slm_pl.errors import UsageError
from slm_pl.evaluation.harness import task_prompts
from slm_pl.evaluation.representation import representation_similarity
from slm_pl.model_card import public_name
from slm_pl.module import CausalLM
from slm_pl.pictures import MATRIX, matrix_names, similarity_matrix

SCHEMA_VERSION = 1


class RepresentationSimilarity(PlanObserver, EarlyCheck):
    """Compares every layer of a model with every other: the matrix of their centered kernel alignment (CKA).

    Runs of layers that do nearly the same thing show as bright squares on the diagonal, the "patches" that led to
    Sliding-Window Merging (https://arxiv.org/abs/2502.19159). The estimator is the minibatch CKA with unbiased HSIC of
    Nguyen et al. 2021 (https://arxiv.org/abs/2010.15327); a minibatch is the tokens of one sample.

    In ``test``, the model that is tested is compared: ``representation_similarity.json`` and ``.png`` in the run
    directory. In ``fit`` and ``prune``, wherever this stands in the list, it is the model as the compression callback
    found it, with the windows that will be merged outlined: ``representation_similarity_before.json`` and ``.png``,
    there and in the export with its model card::

        - class_path: callbacks.RepresentationSimilarity
          init_args: {kernel: rbf}

    Args:
        kernel: ``rbf`` (a Gaussian with the median distance as bandwidth) or ``linear``, which a few tokens with very
            large hidden states can dominate.
        text: What the layers see; default: the data module's calibration text.
        task: Instead, the prompts of this zero-shot task, each a sample.
        local_data: Directory with the task's data; see ``callbacks.ZeroShot``.
        limit: Prompts of the task.
        plan_path: In ``test``, a ``plan.json`` for the tested model whose windows are outlined. Without it, the layers
            that the model's own plan merged are.

    Raises:
        UsageError: If both ``text`` and ``task`` are given, or ``limit`` is below 1.
    """

    def __init__(
        self,
        kernel: Kernel = "rbf",
        text: CalibrationText | None = None,
        task: str | None = None,
        local_data: str | None = None,
        limit: int = 32,
        plan_path: str | None = None,
    ) -> None:
        if text is not None and task is not None:
            raise UsageError(
                f"RepresentationSimilarity got both text ({text.source}) and task ({task}). Give one of them."
            )
        if limit < 1:
            raise UsageError(f"RepresentationSimilarity got limit {limit}; give at least 1 prompt.")
        self.kernel = kernel
        self.text = text
        self.task = task
        self.local_data = local_data
        self.limit = limit
        self.plan_path = plan_path
        self._plan: Plan | None = None
        self._samples: CalibrationSet | None = None
        self._compared = False

    def check(self, trainer: pl.Trainer) -> None:
        """Reads what the layers are to see, so that a missing file is not found after the search."""
        if self._samples is None:
            self._samples = self._read(trainer)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reads the plan and the text before any work."""
        if stage == "test":
            self.check(trainer)
            if self.plan_path is not None:
                path = self.plan_path
                self._plan = on_first_rank(trainer, lambda: Plan.load(path))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a plan of another model before the other hooks measure."""
        assert isinstance(pl_module, CausalLM)
        layers = num_layers(pl_module.load_model())
        if self._plan is not None and self._plan.base.num_layers != layers:
            raise UsageError(
                f"{self.plan_path} is a plan for {self._plan.base.num_layers} layers, the tested model has {layers}. "
                "Give the plan of this model, or leave plan_path out."
            )

    def on_plan(self, trainer: pl.Trainer, pl_module: CausalLM, plan: Plan) -> None:
        """Compares the layers before they are merged."""
        if not _compresses(trainer):
            return
        self._compared = True
        names = matrix_names(len(pl_module.plans) + 1)
        try:
            pl_module.figures |= self._measure(trainer, pl_module, names, _windows(plan))
        except FloatingPointError as error:
            rank_zero_warn(f"RepresentationSimilarity drew nothing: {error}")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compares the layers of the tested model."""
        assert isinstance(pl_module, CausalLM)
        _, results = pl_module.measured()
        windows = None if self._plan is None else _windows(self._plan)
        try:
            self._measure(trainer, pl_module, (f"{MATRIX}.json", f"{MATRIX}.png"), windows)
        except FloatingPointError as error:
            results.missing[MATRIX] = str(error)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Says so if there was nothing to compare, and forgets this run's text."""
        if _compresses(trainer) and not self._compared:
            rank_zero_warn(
                "RepresentationSimilarity had nothing to do: no compression callback acted in this run. Use `test` to "
                "compare the layers of a model as it is."
            )
        self._compared, self._samples, self._plan = False, None, None

    def _measure(
        self,
        trainer: pl.Trainer,
        pl_module: CausalLM,
        names: tuple[str, str],
        windows: list[tuple[int, int]] | None,
    ) -> dict[str, bytes]:
        model, plans, samples = pl_module.load_model(), pl_module.plans, self._samples
        assert samples is not None  # `check` comes before any work
        matrix = representation_similarity(model, samples, self.kernel)
        groups = layer_groups(plans, plans[0].base.num_layers) if plans else [(row,) for row in range(len(matrix))]
        if len(groups) != len(matrix):  # the plans beside this model are not its own
            groups = [(row,) for row in range(len(matrix))]
        labels = [str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}" for group in groups]
        if windows is None:
            windows = [(row, row) for row, group in enumerate(groups) if len(group) > 1]
        source = " + ".join(map(public_name, samples.text.source.split(" + ")))
        record = {
            "schema_version": SCHEMA_VERSION,
            "model": {
                "pretrained": public_name(pl_module.pretrained),
                "num_layers": len(matrix),
                "plan_sha256": plans[-1].sha256 if plans else None,
            },
            "protocol": {
                "similarity": "CKA, minibatch estimator with unbiased HSIC",
                "kernel": self.kernel,
                "text": source,
                "samples": samples.samples,
                "tokens": sum(batch.numel() for batch in samples),
                "sha256": samples.sha256,
            },
            "layers": labels,
            "windows": windows,
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items()]
        rows = ",\n".join("    " + json.dumps(row) for row in matrix)
        text = "{\n" + ",\n".join(lines) + f',\n  "matrix": [\n{rows}\n  ]\n}}\n'
        title = f"Similarity of {len(matrix)} layers ({self.kernel} CKA, {samples.samples} samples of {source})"
        drawn = {names[0]: text.encode(), names[1]: similarity_matrix(matrix, labels, windows, title)}
        run = Path(trainer.default_root_dir)

        def write() -> None:
            for file, content in drawn.items():
                files.write_bytes(run / file, content)

        on_first_rank(trainer, write)
        rank_zero_info(f"Similarity of the layers: {run / names[1]}")
        return drawn

    def _read(self, trainer: pl.Trainer) -> CalibrationSet:
        module = trainer.lightning_module
        assert isinstance(module, CausalLM)
        if self.task is not None:
            task = self.task
            prompts = on_first_rank(trainer, lambda: task_prompts(task, self.local_data, self.limit))
            longest = getattr(module.load_model().config, "max_position_embeddings", None)
            ids = [module.tokenizer(prompt, verbose=False)["input_ids"][:longest] for prompt in prompts]
            samples = CalibrationSet.from_ids(ids, CalibrationText(task, len(ids), max(map(len, ids))))
        elif self.text is not None:
            samples = load_calibration(self.text, module.tokenizer)
        else:
            datamodule = getattr(trainer, "datamodule", None)
            if not isinstance(datamodule, TrainingData):
                raise UsageError(
                    "RepresentationSimilarity needs text: give it text or task, or pass slm_pl.data.AlpacaDataModule "
                    f"as datamodule (got {type(datamodule).__name__})."
                )
            samples = datamodule.calibration_batches()
        if samples.shortest < LEAST_TOKENS:
            raise UsageError(
                f"RepresentationSimilarity got a sample of {samples.shortest} tokens from {samples.text.source}; its "
                f"estimator needs at least {LEAST_TOKENS}. Give longer text, or another task."
            )
        return samples


def _compresses(trainer: pl.Trainer) -> bool:
    """Whether this run compresses a model to keep it."""
    return trainer.state.fn == TrainerFn.FITTING or getattr(trainer, "pruning", False)


def _windows(plan: Plan) -> list[tuple[int, int]]:
    return [(step.low, step.high) for step in plan.steps if isinstance(step, MergeLayers)]
