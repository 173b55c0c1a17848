"""The memory of the tensors of a function. The count is exact and the same in every run."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Count the bytes of all living storages that operations have returned, and the peak of this number.

    All operations are counted, also in a backward pass. Temporary memory within one operation is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor)
        return result

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.bytes += self.held[key]
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.bytes -= self.held.pop(key)


def peak_mebibytes(function: Callable[[], object]) -> float:
    """Return the peak memory of living tensors in the second of two calls, when an optimiser already has its state."""
    function()
    with Ledger() as ledger:
        function()
    return ledger.peak / 2**20
