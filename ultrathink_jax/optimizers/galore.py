"""Adam whose moments of a matrix live in a projection of its gradient to few dims.

Every `every_steps` steps the projection becomes the leading singular vectors of the gradient, on the shorter side of
the matrix; moments are kept as they are. optax.contrib.galore takes no stacks of matrices, and projects the longer
side, which loses a part of later gradients at any rank.

Source: arXiv:2403.03507 algorithm 2. A matrix whose shorter side is within the rank is not projected, as nothing would
be saved: at full rank and a scale of 1 this is Adam.
Letters: m rows  n columns  r rank.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ultrathink_jax.kernels.svd import svd
from ultrathink_jax.models.matrices import MatrixDims, as_matrices, matrix_dims


class GaloreState(NamedTuple):
  """Attributes:
  count: updates so far.
  moments: Adam's; those of a projected matrix have r in place of its shorter side.
  projections: orthonormal rows or columns, with r in place of the longer side; of leaves that have none, a single 0.

  Where r takes the place of several dims, all but the last of them are 1: leaves have the rank of their parameters.
  """

  count: Array
  moments: optax.ScaleByAdamState
  projections: Any


class _Side(NamedTuple):
  """How a leaf is projected: `is_left` from the side of the rows."""

  dims: MatrixDims
  is_left: bool
  rank: int


def scale_by_galore(
  b1: float, b2: float, epsilon: float, rank: int, every_steps: int, scale: float, mu_dtype: Any = None
) -> optax.GradientTransformation:
  """Returns Adam's direction, of matrices `scale` times that of the projected gradient."""
  adam = optax.scale_by_adam(b1, b2, epsilon, mu_dtype=mu_dtype)

  def init(params: Any) -> GaloreState:
    with_sides = partial(_map_with_sides, rank, params)
    low = with_sides(lambda side, leaf: leaf if side is None else jnp.zeros(_shape(leaf, side, True), leaf.dtype))
    nothing = lambda leaf: jnp.zeros((1,) * leaf.ndim, leaf.dtype)
    projections = with_sides(
      lambda side, leaf: nothing(leaf) if side is None else jnp.zeros(_shape(leaf, side, False), leaf.dtype)
    )
    return GaloreState(jnp.zeros((), jnp.int32), adam.init(low), projections)

  @jax.default_matmul_precision("float32")
  def update(gradients: Any, state: GaloreState, params: Any = None) -> tuple[Any, GaloreState]:
    with_sides = partial(_map_with_sides, rank, gradients)
    projections = jax.lax.cond(
      state.count % every_steps == 0,
      lambda: with_sides(lambda side, g, old: old if side is None else _projection(g, side), state.projections),
      lambda: state.projections,
    )
    low = with_sides(lambda side, g, p: g if side is None else _project(g, p, side), projections)
    directions, moments = adam.update(low, state.moments)
    updates = with_sides(
      lambda side, g, d, p: d if side is None else _project_back(d, p, side, g.shape), directions, projections
    )
    scaled = lambda path, u: u if matrix_dims(path, u) is None else scale * u
    updates = jax.tree_util.tree_map_with_path(scaled, updates)
    return updates, GaloreState(optax.safe_increment(state.count), moments, projections)

  return optax.GradientTransformation(init, update)


def _map_with_sides(rank: int, tree: Any, function: Any, *rest: Any) -> Any:
  """Returns function(side or None, leaf, *leaves of rest) of every leaf."""

  def one(path: tuple, leaf: Array, *others: Array) -> Array:
    dims = matrix_dims(path, leaf)
    if dims is None:
      return function(None, leaf, *others)
    m, n = jax.eval_shape(lambda x: as_matrices(x, dims), leaf).shape[-2:]
    side = None if min(m, n) <= rank else _Side(dims, m <= n, rank)
    return function(side, leaf, *others)

  return jax.tree_util.tree_map_with_path(one, tree, *rest)


def _shape(leaf: Array, side: _Side, is_moment: bool) -> tuple[int, ...]:
  """Returns the shape of the moments, which keep the longer side, or of the projection, which keeps the shorter."""
  stack, first = leaf.shape[: side.dims.stack], side.dims.stack + side.dims.rows
  rows, columns = leaf.shape[side.dims.stack : first], leaf.shape[first:]
  low = lambda kept: (*(1,) * (len(kept) - 1), side.rank)
  return (*stack, *low(rows), *columns) if is_moment == side.is_left else (*stack, *rows, *low(columns))


def _projection(gradient: Array, side: _Side) -> Array:
  """Returns the r leading singular vectors of the shorter side, as columns on the left or rows on the right."""
  matrices = as_matrices(gradient, side.dims).astype(jnp.float32)
  left, _, right = svd(matrices)
  vectors = left[..., :, : side.rank] if side.is_left else right[..., : side.rank, :]
  return vectors.reshape(_shape(gradient, side, False)).astype(gradient.dtype)


def _project(gradient: Array, projection: Array, side: _Side) -> Array:
  g, p = as_matrices(gradient, side.dims), as_matrices(projection, side.dims)
  low = jnp.swapaxes(p, -1, -2) @ g if side.is_left else g @ jnp.swapaxes(p, -1, -2)
  return low.reshape(_shape(gradient, side, True))


def _project_back(direction: Array, projection: Array, side: _Side, shape: tuple[int, ...]) -> Array:
  d, p = as_matrices(direction, side.dims), as_matrices(projection, side.dims)
  return (p @ d if side.is_left else d @ p).reshape(shape)
