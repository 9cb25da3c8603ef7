"""How much memory a computation would take on a device, by shapes alone: on `meta`, where tensors hold no numbers."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


GIB = 2**30


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all that is made inside and is alive at a time. A lower bound: kernels have a workspace, and what
    autocast casts is left out.

    Attributes:
        peak: the highest count.
    """

    def __init__(self, *modules: torch.nn.Module) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.total = self.peak = 0
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self._count(tensor)

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.alive:
            return
        self.alive[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._free, storage._cdata)
        self.total += storage.nbytes()
        self.peak = max(self.peak, self.total)

    def _free(self, key: int) -> None:
        self.total -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "meta":
                self._count(value)
        return result
