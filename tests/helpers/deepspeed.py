"""DeepSpeed between two CPU processes, for tests alone."""

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's strategy without its two checks for a CUDA device.

    It is for tests only: DeepSpeed itself trains on CPUs (``DS_ACCELERATOR=cpu``, gloo), slowly, and Lightning refuses
    that. With it, what this project does with partitioned weights runs where there is no GPU; everything that is
    computed, partitioned and saved is what :class:`DeepSpeedStrategy` makes of it.

    Args:
        options: Of :class:`DeepSpeedStrategy`.
    """

    def __init__(self, **options: object) -> None:
        super().__init__(process_group_backend="gloo", **options)  # type: ignore[arg-type]
        assert isinstance(self.config, dict)
        # Small parameters stay gathered by default, and all of a pico model's are small.
        self.config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100_000}

    @property
    def root_device(self) -> torch.device:
        """The CPU, with an index, which DeepSpeed asks for."""
        return torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        """What the parent does after its check for CUDA."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """What the parent does after its check of the device indices."""
        self.set_world_ranks()
        self._init_deepspeed_distributed()
