"""The Lightning trainer with one more entry point."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class Trainer(pl.Trainer):
    """Lightning's trainer with :meth:`prune`, and with ``ckpt_path`` known to the set-up hooks.

    Attributes:
        overwrite: Whether outputs of an earlier run may be replaced.
        pruning: Whether :meth:`prune` is running.
    """

    overwrite: bool = False
    pruning: bool = False

    def prune(self, model: pl.LightningModule, datamodule: pl.LightningDataModule | None = None) -> None:
        """Compress the model and export it, without training.

        Runs the set-up of every callback, on every rank, and no loop: compression callbacks compress,
        ``callbacks.ExportCheckpoint`` exports.
        """
        limit, self.limit_predict_batches = self.limit_predict_batches, 0
        self.pruning = True
        try:
            self.predict(model, datamodule=datamodule, return_predictions=False)
        finally:
            self.pruning = False
            self.limit_predict_batches = limit

    def _run(
        self,
        model: pl.LightningModule,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        # Lightning fills `ckpt_path` in after the set-up hooks; ours must know whether weights will be restored: a
        # resumed run takes its plan from disk, and `test` wraps the model in the adapters that the checkpoint holds.
        self._checkpoint_connector._ckpt_path = ckpt_path
        return super()._run(model, ckpt_path=ckpt_path, weights_only=weights_only)
