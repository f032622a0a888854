"""Save and restore the states of this process's global random generators as tensors."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

_PYTHON_VERSION = 3  # of the state that `random.getstate` returns
_NUMPY_GENERATOR = "MT19937"  # the global one


def generator_states() -> dict[str, Tensor]:
    """Return the states of Python's, NumPy's and torch's global generators, bit for bit."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached_gauss = np.random.get_state()
    # Empty or one value: the second number of a normal pair that `random.gauss` keeps for its next call.
    spare = [] if gauss is None else [gauss]
    # The words are uint32, for which torch has hardly an operation: they are widened.
    wide_keys = np.asarray(keys, np.int64)
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor(spare, dtype=torch.float64),
        "numpy": torch.from_numpy(wide_keys),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached_gauss], dtype=torch.float64),
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generator_states(states: dict[str, Tensor]) -> None:
    """Set the generators to ``states``, the inverse of `generator_states`."""
    words = tuple(states["python"].tolist())
    spare = states["python.gauss"].tolist()
    gauss = spare[0] if spare else None
    random.setstate((_PYTHON_VERSION, words, gauss))

    keys = states["numpy"].numpy().astype(np.uint32)
    position, has_gauss = states["numpy.position"].tolist()
    cached_gauss = states["numpy.gauss"].item()
    np.random.set_state((_NUMPY_GENERATOR, keys, position, has_gauss, cached_gauss))

    torch.random.set_rng_state(states["torch"])
    # A checkpoint of a GPU run may be resumed on CPUs, and the other way round.
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
