"""The singular value decomposition of stacks of matrices."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ultrathink_jax.platform import target_platform


def svd(
  matrices: Float[Array, "*stack m n"],
) -> tuple[Float[Array, "*stack m r"], Float[Array, "*stack r"], Float[Array, "*stack r n"]]:
  """Returns left vectors, values and right vectors, the largest of the r = min(m, n) values first.

  On CPU one matrix after another: the call for a stack waits for threads of the pool whose thread it runs in, and where
  as many calls as there are threads have come so far, for ever.
  """
  decompose = partial(jnp.linalg.svd, full_matrices=False)
  *stack, m, n = matrices.shape
  if not stack or target_platform() != "cpu":
    return tuple(decompose(matrices))
  parts = jax.lax.map(lambda matrix: tuple(decompose(matrix)), matrices.reshape(-1, m, n))
  return tuple(part.reshape(*stack, *part.shape[1:]) for part in parts)
