"""Models that are larger than memory: the weights stay in their files, and a few layers at a time are read.

Transformers maps the weights of a safetensors file instead of reading them, if their dtype stays what it is. So every
weight is there for whoever asks, and is read when it is touched; what is missing is that layers which have done their
work go again, that the next one is on its way before it is needed, and that weights which became narrower do not pile
up. With these, a search or a one-shot criterion needs the memory of one layer beside its hidden states, with the same
code, the same numbers and the same export as for a model in memory. What a plan merges or refits stays in memory: that
is a few layers.

On a GPU, each layer's weights are sent while the one before it runs and are gone when another one begins; embeddings,
norm and head are there all the time. Methods that compute with weights outside of a layer's own forward pass cannot do
that (:attr:`callbacks.base.CompressionCallback.computes_with_weights`).
"""

import contextlib
import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor, nn

from slm_pl.compression.architecture import decoder_layers
from slm_pl.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MOST_IN_MEMORY = 0.05
"""Share of the weights that may be in memory and not in a file, such as those of norms that were merged."""

Range = tuple[int, int]


def check_dtype(config: "PreTrainedConfig", dtype: str) -> None:
    """Tells a model whose weights would be read into memory to get another dtype.

    Args:
        config: Of the checkpoint.
        dtype: What is asked for, or ``auto``.

    Raises:
        UsageError: If the checkpoint says it is of another one.
    """
    stored = str(config.dtype).removeprefix("torch.")
    if dtype not in ("auto", stored) and config.dtype is not None:
        raise UsageError(
            f"model.dtype is {dtype} and the checkpoint's {stored}, so its weights cannot be streamed: they are used "
            "as they are in their files. Give --model.dtype auto."
        )


def check_streamed(model: "PreTrainedModel") -> None:
    """Tells a model whose weights were read into memory.

    Raises:
        UsageError: If more than a small part was.
    """
    files = _mapped_files()
    parameters = list(model.parameters())
    read = sum(p.nbytes for p in parameters if not _inside(_range(p), files))
    if read > MOST_IN_MEMORY * sum(p.nbytes for p in parameters):
        raise UsageError(
            f"{read / 1e9:.2f} GB of the weights were read into memory, so they cannot be streamed. That is so where "
            "their dtype is not that of the file (leave out model.dtype), where the file is no safetensors, and for "
            "layers of experts, which transformers puts together."
        )


@contextlib.contextmanager
def streaming(model: "PreTrainedModel", device: torch.device) -> Iterator[None]:
    """Lets the layers of a model come and go while it is computed with; its weights must not be changed meanwhile.

    Args:
        model: On the CPU, its weights mapped from files.
        device: Where to compute.
    """
    layers = list(decoder_layers(model))
    with contextlib.ExitStack() as stack:
        stream = _Mapped(layers) if device.type == "cpu" else stack.enter_context(_sent(model, layers, device))
        for index, layer in enumerate(layers):
            begun = layer.register_forward_pre_hook(lambda module, _, index=index: stream.begin(index, module))
            done = layer.register_forward_hook(lambda module, *_: stream.end(module), always_call=True)
            stack.callback(begun.remove)
            stack.callback(done.remove)
        yield
        if isinstance(stream, _Mapped):
            stream.close()


class _Mapped:
    """On a CPU: pages of the next layer are asked for, those of the last one given back."""

    def __init__(self, layers: list[nn.Module]) -> None:
        files = _mapped_files()
        ranges = [[place for p in layer.parameters() if _inside(place := _range(p), files)] for layer in layers]
        # Pages that were written to hold what is in no file: giving them back would lose it.
        self._ranges = [_joined(place for place in own if not _written(place)) for own in ranges]
        for own in self._ranges:
            _advise(own, mmap.MADV_DONTNEED)
        self._now: int | None = None

    def begin(self, index: int, layer: nn.Module) -> None:
        """A layer is about to run."""
        if index == self._now:
            return  # on the next batch
        self.close()
        self._now = index
        if index + 1 < len(self._ranges):
            _advise(self._ranges[index + 1], mmap.MADV_WILLNEED)

    def end(self, layer: nn.Module) -> None:
        """A layer has run; it may do so again at once."""

    def close(self) -> None:
        """Gives the pages of the layer that ran last back; a later read finds them in the file."""
        if self._now is not None:
            _advise(self._ranges[self._now], mmap.MADV_DONTNEED)


class _Sent:
    """On a GPU: a layer's weights are there from when it runs to when another one does, the next one's on their way.

    Another thread sends them, on a stream of its own, so that neither this process nor the GPU waits.
    """

    def __init__(self, layers: list[nn.Module], device: torch.device) -> None:
        self._device = device
        # Now, since what is lent to a layer stands in its place while it runs.
        self._layers = [list(layer.parameters()) for layer in layers]
        self._lasting = {id(p) for own in self._layers for p in own}
        self._now: int | None = None
        self._there: dict[int, Tensor] = {}  # copies, by the identity of the tensor
        self._own: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._ahead: tuple[int, Future[dict[int, Tensor]]] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, index: int, layer: nn.Module) -> None:
        """A layer is about to run: copies take the place of its parameters, also of those that are only lent to it."""
        if index != self._now:
            self._now, self._there = index, {}
            if not torch.is_grad_enabled():  # for gradients, copies are part of what is computed
                self._there = self._arrived(index)
                if index + 1 < len(self._layers):
                    self._ahead = index + 1, self._sender.submit(self._send, index + 1)
        for module in layer.modules():
            parameters: dict[str, Tensor | None] = module._parameters  # type: ignore[assignment]
            for name, value in parameters.items():
                if value is None:
                    continue
                self._own.append((parameters, name, value))
                parameters[name] = self._copy(value)

    def _send(self, index: int) -> dict[int, Tensor]:
        """In the other thread."""
        with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            sent = {id(p): p.detach().to(self._device, copy=True) for p in self._layers[index]}
        if self._stream is not None:
            self._stream.synchronize()
        return sent

    def _arrived(self, index: int) -> dict[int, Tensor]:
        """A layer's weights: those that were sent before it was its turn, else now."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != index:
            if ahead is not None:
                ahead[1].cancel()
            ahead = index, self._sender.submit(self._send, index)
        sent = ahead[1].result()
        if self._stream is not None:
            for tensor in sent.values():  # else the next layer's might be written over it before it is used
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return sent

    def _copy(self, value: Tensor) -> Tensor:
        if value.requires_grad and torch.is_grad_enabled():
            return value.to(self._device, copy=True)  # a gradient finds its way back through it
        if id(value) not in self._lasting:
            return value.to(self._device, copy=True)
        if id(value) not in self._there:
            self._there[id(value)] = value.detach().to(self._device, copy=True)
        return self._there[id(value)]

    def end(self, layer: nn.Module) -> None:
        """A layer has run, or failed to."""
        for parameters, name, value in self._own:
            parameters[name] = value
        self._own.clear()

    def close(self) -> None:
        """Nothing is sent any more."""
        self._sender.shutdown(cancel_futures=True)
        self._ahead = None


@contextlib.contextmanager
def _sent(model: "PreTrainedModel", layers: list[nn.Module], device: torch.device) -> Iterator[_Sent]:
    """Everything but the layers is on the device for as long as this lasts."""
    inside = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    moved: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in inside:
                moved.append((tensor, tensor.data))
                tensor.data = tensor.data.to(device)
        for layer in layers:
            for buffer in layer.buffers():
                moved.append((buffer, buffer.data))
                buffer.data = buffer.data.to(device)
        stream = _Sent(layers, device)
        try:
            yield stream
        finally:
            stream.close()
    finally:
        for tensor, own in moved:
            tensor.data = own


class Spill:
    """Writes weights that surgery made anew to a file, and maps them from there.

    Args:
        directory: Where; the files have no name for longer than it takes to map them.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self._directory = directory

    @torch.no_grad()
    def __call__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Lets these be on disk from now on; the same tensors, tied or not, with the same values."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        files = _mapped_files()
        new = {str(number): p for number, p in enumerate(parameters) if not _inside(_range(p), files) and p.numel()}
        if not new:
            return
        # A network file system keeps a mapped file under another name for as long as it is mapped.
        with tempfile.TemporaryDirectory(dir=self._directory, prefix="slm_pl-", ignore_cleanup_errors=True) as folder:
            path = os.path.join(folder, "weights.safetensors")
            save_file({name: p.data.contiguous() for name, p in new.items()}, path)
            with safe_open(path, "pt") as content:
                for name, parameter in new.items():
                    parameter.data = content.get_tensor(name)


def _range(tensor: Tensor) -> Range:
    """Where a tensor is, from its first byte to behind its last."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _mapped_files() -> list[Range]:
    """Where files are mapped, in order."""
    found: list[Range] = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
            if inode != "0":
                start, end = (int(part, 16) for part in addresses.split("-"))
                found.append((start, end))
    return _joined(found)


def _joined(ranges: Iterable[Range]) -> list[Range]:
    """In order; what lies side by side is one."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


def _inside(place: Range, files: list[Range]) -> bool:
    return any(start <= place[0] and place[1] <= end for start, end in files)


def _written(place: Range) -> bool:
    """Whether a page of this range is no longer that of the file, as the kernel tells it."""
    first, last = place[0] // mmap.PAGESIZE, -(-place[1] // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb") as pages:
        pages.seek(first * 8)
        entries = numpy.frombuffer(pages.read((last - first) * 8), dtype=numpy.uint64)
    there = (entries >> numpy.uint64(62)) != 0  # in memory, or swapped out
    of_a_file = (entries >> numpy.uint64(61)) & numpy.uint64(1) == 1
    return bool((there & ~of_a_file).any())


def _advise(ranges: Iterable[Range], advice: int) -> None:
    """Tells the kernel what becomes of the whole pages in these ranges."""
    libc, page = ctypes.CDLL(None), mmap.PAGESIZE
    for start, end in ranges:
        first, last = -(-start // page) * page, end // page * page
        if first < last:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
