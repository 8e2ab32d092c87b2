"""Hidden states of many samples on disk, so that main memory holds those of one chunk."""

import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor


class Spool:
    """One hidden state for each chunk of the samples, in a temporary file without a name.

    Args:
        shapes: Shape of the hidden state of each chunk.
        dtype: Of all of them.
        device: Where they are read to.
    """

    def __init__(self, shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device) -> None:
        self._shapes, self._dtype, self._device = shapes, dtype, device
        sizes = [shape.numel() * dtype.itemsize for shape in shapes]
        self._starts = [sum(sizes[:number]) for number in range(len(sizes))]
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as this

    def write(self, chunk: int, hidden: Tensor) -> None:
        """Replaces the state of a chunk."""
        assert (hidden.shape, hidden.dtype) == (self._shapes[chunk], self._dtype)
        self._file.seek(self._starts[chunk])
        self._file.write(hidden.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def read(self, chunk: int) -> Tensor:
        """The state of a chunk that was written before."""
        shape = self._shapes[chunk]
        content = bytearray(shape.numel() * self._dtype.itemsize)
        self._file.seek(self._starts[chunk])
        self._file.readinto(content)
        return torch.frombuffer(content, dtype=self._dtype).view(shape).to(self._device)

    def close(self) -> None:
        """Gives the disk space back."""
        self._file.close()
