"""Similarity of a model's layers to each other, as a test hook."""

import json
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.base import PlanObserver, on_first_rank
from slm_pl import files
from slm_pl.compression.architecture import num_layers
from slm_pl.compression.plan import MergeLayers, Plan, layer_groups
from slm_pl.compression.scores import Kernel
from slm_pl.data import AlpacaDataModule, CalibrationSet, CalibrationText, load_calibration
from slm_pl.errors import UsageError
from slm_pl.evaluation.representation import representation_similarity
from slm_pl.evaluation.zero_shot import task_prompts
from slm_pl.module import CausalLM
from slm_pl.pictures import MATRIX, similarity_matrix

SCHEMA_VERSION = 1


class RepresentationSimilarity(PlanObserver):
    """Compares every layer of a model with every other: the matrix of their centered kernel alignment (CKA).

    Runs of layers that do nearly the same thing show as bright squares on the diagonal, the "patches" that led to
    Sliding-Window Merging (https://arxiv.org/abs/2502.19159). The estimator is the minibatch CKA with unbiased HSIC of
    Nguyen et al. 2021 (https://arxiv.org/abs/2010.15327); a minibatch is the tokens of one sample.

    In ``test``, the model that is tested is compared. In ``fit`` and ``prune``, wherever this stands in the list, it is
    the model as the compression callback found it, with the windows that will be merged outlined; an export shows that
    picture in its model card. ``representation_similarity.json`` and ``.png`` go to the run directory::

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

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reads the plan before any work."""
        if stage == "test" and self.plan_path is not None:
            path = self.plan_path
            self._plan = on_first_rank(trainer, lambda: Plan.load(path))

    def on_plan(self, trainer: pl.Trainer, pl_module: CausalLM, plan: Plan) -> None:
        """Compares the layers before they are merged."""
        if trainer.state.fn == TrainerFn.FITTING or getattr(trainer, "pruning", False):
            number = len(pl_module.plans) + 1
            name = MATRIX if number == 1 else f"{MATRIX}.{number}"
            pl_module.figures |= self._measure(trainer, pl_module, name, _windows(plan))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compares the layers of the tested model."""
        assert isinstance(pl_module, CausalLM)
        model, results = pl_module.measured()
        windows: list[tuple[int, int]] | None = None
        if self._plan is not None:
            if self._plan.base.num_layers != num_layers(model):
                raise UsageError(
                    f"{self.plan_path} is a plan for {self._plan.base.num_layers} layers, the tested model has "
                    f"{num_layers(model)}. Give the plan of this model, or leave plan_path out."
                )
            windows = _windows(self._plan)
        try:
            self._measure(trainer, pl_module, MATRIX, windows)
        except FloatingPointError as error:
            results.missing[MATRIX] = str(error)

    def _measure(
        self, trainer: pl.Trainer, pl_module: CausalLM, name: str, windows: list[tuple[int, int]] | None
    ) -> dict[str, bytes]:
        model, plans = pl_module.load_model(), pl_module.plans
        samples = self._samples(trainer, pl_module)
        matrix = representation_similarity(model, samples, self.kernel)
        groups = layer_groups(plans, plans[0].base.num_layers if plans else len(matrix))
        labels = [str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}" for group in groups]
        if windows is None:
            windows = [(row, row) for row, group in enumerate(groups) if len(group) > 1]
        record = {
            "schema_version": SCHEMA_VERSION,
            "model": {
                "pretrained": pl_module.pretrained,
                "num_layers": len(matrix),
                "plan_sha256": plans[-1].sha256 if plans else None,
            },
            "protocol": {
                "similarity": "CKA, minibatch estimator with unbiased HSIC",
                "kernel": self.kernel,
                "text": samples.text.source,
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
        source = Path(samples.text.source).name  # of a file, without its directories
        title = f"Similarity of {len(matrix)} layers ({self.kernel} CKA, {samples.samples} samples of {source})"
        drawn = {
            f"{name}.json": text.encode(),
            f"{name}.png": similarity_matrix(matrix, labels, windows, title),
        }
        run = Path(trainer.default_root_dir)

        def write() -> None:
            for file, content in drawn.items():
                files.write_bytes(run / file, content)

        on_first_rank(trainer, write)
        rank_zero_info(f"Similarity of the layers: {run / name}.png")
        return drawn

    def _samples(self, trainer: pl.Trainer, pl_module: CausalLM) -> CalibrationSet:
        if self.task is not None:
            prompts = task_prompts(self.task, self.local_data, self.limit)
            ids = [pl_module.tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
            longest = max(len(sample) for sample in ids)
            return CalibrationSet.from_ids(ids, CalibrationText(self.task, len(ids), longest))
        if self.text is not None:
            return load_calibration(self.text, pl_module.tokenizer)
        datamodule = getattr(trainer, "datamodule", None)
        if not isinstance(datamodule, AlpacaDataModule):
            raise UsageError(
                "RepresentationSimilarity needs text: give it text or task, or pass slm_pl.data.AlpacaDataModule as "
                f"datamodule (got {type(datamodule).__name__})."
            )
        return datamodule.calibration_batches()


def _windows(plan: Plan) -> list[tuple[int, int]]:
    return [(step.low, step.high) for step in plan.steps if isinstance(step, MergeLayers)]
