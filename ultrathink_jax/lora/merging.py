"""Adapters worked into the weights of the base, one matrix after another."""

from typing import Any

import jax
import numpy as np

from ultrathink_jax.errors import NumericsError
from ultrathink_jax.layers.adapter import merged
from ultrathink_jax.models.naming import has_at, leaf_at, put_at
from ultrathink_jax.types import Adapted, Adapter, Parameters


def merge(weights: Adapted) -> Parameters:
  """Returns float32 parameters of a model without adapters that computes what `weights`, none in few bits, do.

  A matrix at a time is made on the device, so that beside the result no second model is held there.

  Raises:
    NumericsError: a merged weight is not finite.
  """
  whole = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), weights.params)
  for keys, adapter in _adapters(weights):
    path = (*(key.key for key in keys[:-1]), "kernel")
    kernel = leaf_at(whole, path)
    flat = kernel.reshape(*adapter.a.shape[:-1], -1)
    layers = (jax.tree.map(lambda leaf, i=i: leaf[i], adapter) for i in range(len(flat)))
    new = np.stack([np.asarray(_merged(*pair)) for pair in zip(flat, layers, strict=True)])
    if not np.isfinite(new).all():
      raise NumericsError(f"merging {'/'.join(path)} gives numbers that are not finite; the adapter is broken")
    put_at(whole, path, new.reshape(kernel.shape))
  return whole


_merged = jax.jit(merged)


@jax.jit
def with_merged_banks(weights: Adapted) -> Adapted:
  """Returns the weights with the adapters of float experts in their matrices, which each token would make anew."""
  params = jax.tree.map(lambda leaf: leaf, weights.params)
  lora: dict[str, Any] = {}
  for keys, adapter in _adapters(weights):
    path = tuple(key.key for key in keys)
    kernel = (*path[:-1], "kernel")
    if adapter.a.ndim == 4 and has_at(params, kernel):
      put_at(params, kernel, merged(leaf_at(params, kernel), adapter))
    else:
      put_at(lora, path, adapter)
  return weights._replace(params=params, lora=lora)


def _adapters(weights: Adapted) -> list[tuple[Any, Adapter]]:
  """Returns the path and the adapter of every stack that has one."""
  return jax.tree_util.tree_leaves_with_path(weights.lora, is_leaf=lambda leaf: isinstance(leaf, Adapter))
