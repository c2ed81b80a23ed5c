import jax
import numpy as np
import pytest

from ultrathink_jax.kernels import sum_of_squares as module
from ultrathink_jax.kernels.sum_of_squares import sum_of_squares


@pytest.mark.parametrize("shape", [(), (7,), (4, 8), (5, 3, 11), (16, 4)])
def test_blocks_and_what_is_left_of_them_are_summed(shape, monkeypatch):
  monkeypatch.setattr(module, "_BLOCK", 8)
  array = jax.random.normal(jax.random.key(0), shape)
  expected = np.sum(np.square(np.asarray(array, np.float64)))
  np.testing.assert_allclose(jax.jit(sum_of_squares)(array), expected, rtol=1e-6)
