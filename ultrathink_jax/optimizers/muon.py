"""Muon: momentum of a matrix made orthogonal, and Adam for every leaf that is no matrix.

Both rules are Optax's. An update is 0.2 sqrt(max(m, n)) times the orthogonal matrix, with a root mean square about that
of an AdamW update: one learning rate and one weight decay serve both. optax.contrib.muon splits the parameters by
optax.partition, whose state has gaps where the other rule is at work and can not be laid out like the parameters.

Source: kellerjordan.github.io/posts/muon (rule), arXiv:2502.16982 section 2.2 (scale).
Letters: m rows  n columns.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from ultrathink_jax.models.matrices import as_matrices, matrix_dims

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration
_RMS = 0.2


class MixedState(NamedTuple):
  """Momentum of every leaf, and Adam's second moments, of matrices a single 0 in their place."""

  count: Array
  mu: Any
  nu: Any


def scale_by_muon_and_adam(b1: float, b2: float, epsilon: float, mu_dtype: Any = None) -> optax.GradientTransformation:
  """Returns Muon's direction for matrices, with Nesterov's momentum, and Adam's for other leaves."""
  adam = optax.scale_by_adam(b1, b2, epsilon, mu_dtype=mu_dtype)
  muon = scale_by_muon(
    ns_coeffs=_COEFFICIENTS,
    beta=b1,
    mu_dtype=mu_dtype,
    weight_dimension_numbers=lambda matrices: [MuonDimensionNumbers(-2, -1)] * len(matrices),
  )

  def init(params: Any) -> MixedState:
    def second_moment(path: tuple, leaf: Array) -> Array:
      return jnp.zeros(leaf.shape if matrix_dims(path, leaf) is None else (1,) * leaf.ndim, leaf.dtype)

    mu = optax.tree.zeros_like(params, dtype=mu_dtype)
    return MixedState(jnp.zeros((), jnp.int32), mu, jax.tree_util.tree_map_with_path(second_moment, params))

  def update(gradients: Any, state: MixedState, params: Any = None) -> tuple[Any, MixedState]:
    leaves, tree = jax.tree_util.tree_flatten_with_path(gradients)
    dims = [matrix_dims(path, leaf) for path, leaf in leaves]
    gradients = [leaf for _, leaf in leaves]
    mu, nu = tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)
    updates = list(gradients)
    here = [i for i, dim in enumerate(dims) if dim is not None]
    matrices = lambda values: [as_matrices(values[i], dims[i]) for i in here]
    of_muon = MuonState(state.count, matrices(mu), jnp.array(_COEFFICIENTS))
    directions, of_muon = muon.update(matrices(gradients), of_muon)
    for i, direction, momentum in zip(here, directions, of_muon.mu, strict=True):
      scale = _RMS * math.sqrt(max(direction.shape[-2:]))
      updates[i], mu[i] = (scale * direction).reshape(gradients[i].shape), momentum.reshape(gradients[i].shape)
    there = [i for i, dim in enumerate(dims) if dim is None]
    of_adam = optax.ScaleByAdamState(state.count, [mu[i] for i in there], [nu[i] for i in there])
    directions, of_adam = adam.update([gradients[i] for i in there], of_adam)
    for i, direction, first, second in zip(there, directions, of_adam.mu, of_adam.nu, strict=True):
      updates[i], mu[i], nu[i] = direction, first, second
    state = MixedState(optax.safe_increment(state.count), tree.unflatten(mu), tree.unflatten(nu))
    return tree.unflatten(updates), state

  return optax.GradientTransformation(init, update)
