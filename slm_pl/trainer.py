"""The Lightning trainer with one more entry point."""

import lightning.pytorch as pl


class Trainer(pl.Trainer):
    """Lightning's trainer, and :meth:`prune`.

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
        self.pruning = True
        self.limit_predict_batches = 0
        try:
            self.predict(model, datamodule=datamodule, return_predictions=False)
        finally:
            self.pruning = False
