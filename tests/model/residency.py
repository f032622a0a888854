"""A device played on the CPU: which tensors would lie on it, and what would make the host wait for it.

A tensor is on the device if it was sent there, made there by name (``device=``), or computed from one that is.  Noted
are reads of such a tensor's values by the host, and operations between the two sides, which a GPU refuses or waits for.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# The host learns a value, or the size of the result, from the device.
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.bincount, aten.equal}
READS |= {aten.unique_consecutive, aten.unique_dim, aten.is_nonzero}
COPIES_TO_HOST = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu"}
FACTORIES = {torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.rand, torch.randn, torch.randint}


class Residency(TorchDispatchMode):
    """Follows the tensors through what is computed while it is active.

    Attributes:
        noted: What would have waited, or failed, and where in the project or in Megatron; how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noted: Counter[str] = Counter()
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no other takes their addresses
        self._makers = _Makers(self)

    def __enter__(self) -> Residency:
        self._makers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._makers.__exit__(*error)

    def put(self, tensors: Iterable[Tensor]) -> None:
        """Note that ``tensors`` are on the device."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is there."""
        return tensor.untyped_storage()._cdata in self._storages

    def sent(self, tensor: Tensor, device: object) -> Tensor:
        """In place of `send`: a copy, on the device."""
        with _disable_current_modes():
            copy = tensor.clone()
        self.put([copy])
        return copy

    def kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, which on a GPU is one kernel: nothing inside is looked at."""

        def launch(*arguments: Any) -> Any:
            with _disable_current_modes():
                result = function(*arguments)
            self.put(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
            return result

        return launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in given if self.holds(tensor)]
        if here:
            self._judge(func.overloadpacket, given, here, args)
        result = func(*args, **kwargs)
        if here:
            self.put(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _judge(self, operation: Any, given: list[Tensor], here: list[Tensor], args: Sequence[Any]) -> None:
        others = [tensor for tensor in given if tensor.dim() and not self.holds(tensor)]
        if operation in READS:
            self.note(f"{operation} reads the device")
        elif others:
            self.note(f"{operation} mixes the device with {[tuple(tensor.shape) for tensor in others]} of the host")
        elif operation in (aten.index, aten.index_put, aten.index_put_):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            if masks:
                self.note(f"{operation} counts a mask on the device")

    def note(self, what: str) -> None:
        """Count ``what`` at the innermost line of the project's or Megatron's."""
        own = [f for f in traceback.extract_stack() if "ovr_megatron/" in f.filename or "megatron/core" in f.filename]
        where = f"{own[-1].filename.rpartition('megatron/')[2]}:{own[-1].lineno}" if own else "?"
        self.noted[f"{where}: {what}"] += 1


class _Makers(TorchFunctionMode):
    """Tensors made with ``device=`` are on the device; values from a list, or for the host, would be waited for."""

    def __init__(self, residency: Residency):
        super().__init__()
        self.residency = residency

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func in COPIES_TO_HOST and self.residency.holds(args[0]):
            self.residency.note(f"{COPIES_TO_HOST[func]} reads the device")
        result = func(*args, **(kwargs or {}))
        if (kwargs or {}).get("device") is not None:
            if func is torch.tensor:
                self.residency.note("torch.tensor copies a value to the device")
            if func in FACTORIES or func is torch.tensor:
                self.residency.put([result])
        return result
