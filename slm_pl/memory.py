"""How many bytes of tensors are alive."""

import weakref
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold a tensor's values: itself or, of a quantised one, its integers and scales."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in plain_tensors(getattr(tensor, name))]


class TensorBytes(TorchDispatchMode):
    """Adds up the storages of the tensors that operators make, for as long as they live.

    Args:
        model: Its parameters and buffers, and views of them, do not count.

    Attributes:
        live: Bytes now.
        peak: Most bytes so far.
    """

    supports_higher_order_operators = True  # such as flex attention

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()
        self.leave_out(plain for t in (*model.parameters(), *model.buffers()) for plain in plain_tensors(t))

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Does not count these tensors, nor views of them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known.add(storage._cdata)
            weakref.finalize(storage, self._known.discard, storage._cdata)  # a later one may have its address

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            for tensor in plain_tensors(leaf) if isinstance(leaf, Tensor) else ():
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes
