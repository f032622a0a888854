"""Copy host tensors to the device without a wait of the host."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return ``tensor`` on ``device``, copied if it is not there.

    The copy to a GPU comes from pinned memory, in the order of the work there, and the host does not wait for it. A
    plain copy would wait until the device has done everything that was queued before.
    """
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
