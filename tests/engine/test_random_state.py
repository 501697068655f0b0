"""The states of random number generators are kept and put back."""
import random

import numpy as np
import torch

from spartan_mm.engine.random_state import get_random_state, set_random_state
from spartan_mm.engine.replay import pack, unpack


def draw():
    return random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist()


def test_states_are_put_back(tmp_path):
    draw()  # generators keep the second of two normal numbers
    torch.save(get_random_state(), tmp_path / 'state.pth')
    drawn = draw()
    set_random_state(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert draw() == drawn


def test_states_that_version_0_1_kept_of_a_batch():
    state = unpack(pack(dict(python=random.getstate(), numpy=np.random.get_state(),
                             torch=torch.get_rng_state())))
    drawn = draw()
    set_random_state(state)
    assert draw() == drawn
