import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultrathink_jax.kernels.svd import svd


@pytest.mark.parametrize("shape", [(5, 7), (3, 7, 5), (2, 3, 4, 4)])
def test_the_parts_make_the_matrices_again(shape):
  matrices = jax.random.normal(jax.random.key(0), shape)
  left, values, right = jax.jit(svd)(matrices)
  np.testing.assert_allclose(left * values[..., None, :] @ right, matrices, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(values, np.linalg.svd(matrices, compute_uv=False), rtol=1e-4, atol=1e-4)


def test_lapack_gets_one_matrix_at_a_time():
  # Of a stack it waits for threads of the pool that it runs in, which other devices may all have taken to wait in too.
  program = jax.jit(svd).lower(jax.ShapeDtypeStruct((3, 2, 5, 7), jnp.float32)).as_text()
  assert re.findall(r"custom_call @lapack_sgesdd.*: \(tensor<(.*?)>\)", program) == ["5x7xf32"]
