"""The way of host tensors to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on ``device``.

    To a GPU it travels from pinned memory, in the order of the work there, and the host does not wait for it: a plain
    copy waits until the device has done everything that it was given before.
    """
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
