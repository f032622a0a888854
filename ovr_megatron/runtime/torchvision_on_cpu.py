"""Let torchvision's CUDA build be imported beside a CPU build of torch.

The package registry has no other torchvision for Linux.  `ovr_megatron` puts the finder in place for what it starts
itself; ``examples/install.sh`` copies this file into the environment, so that Transformers and ``vllm serve`` work
there without this project.  It imports nothing but the standard library, for it runs whenever an interpreter starts.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any


class TorchvisionSchemas(importlib.abc.MetaPathFinder):
    """Declares the operators that torchvision registers fakes for, when its own library cannot load.

    torchvision of the package registry is linked against CUDA; beside a CPU torch its C++ library does not
    load and ``torchvision._meta_registrations`` then fails on unknown operators.  They only need a schema.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Find nothing; declare the operators just before the module that needs them is looked for."""
        if name != "torchvision._meta_registrations" or sys.modules["torchvision.extension"]._has_ops():
            return
        library = sys.modules["torch"].library
        for operator in ("nms", "qnms"):
            library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.meta_path.remove(self)


def let_torchvision_import() -> None:
    """Make ``import torchvision`` work beside a CPU torch; free until torchvision is imported."""
    # By name: the environment has a copy of this file.
    if not any(type(finder).__name__ == TorchvisionSchemas.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionSchemas())
