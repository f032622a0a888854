"""Random generators go on where they were."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ovr_megatron.checkpoint.generators import generator_states, set_generator_states


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(), torch.rand(1).item()]


@pytest.mark.parametrize("warm", [False, True])  # a normal draw leaves a second one behind
def test_the_same_numbers_come_again(tmp_path, warm: bool) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    if warm:
        draw()
    save_file(generator_states(), tmp_path / "states.safetensors")
    first = [draw() for _ in range(3)]
    assert [draw() for _ in range(3)] != first
    set_generator_states(load_file(tmp_path / "states.safetensors"))
    assert [draw() for _ in range(3)] == first
