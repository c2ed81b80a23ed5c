"""Adapters worked into the weights of the base, one matrix after another."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ultrathink_jax.errors import NumericsError
from ultrathink_jax.kernels.quantized import Quantized, dequantize
from ultrathink_jax.layers.adapter import merged
from ultrathink_jax.models.naming import has_at, leaf_at, put_at
from ultrathink_jax.types import Adapted, Adapter, Parameters


def merge(weights: Adapted, base: Parameters | None = None) -> Parameters:
  """Returns float32 parameters of a model without adapters that computes what `weights` do.

  `base` are the parameters in full precision of a base that `weights` hold in few bits; without it those are merged
  into. A matrix at a time is made on the device, so that beside the result no second model is held.

  Raises:
    NumericsError: a merged weight is not finite.
  """
  whole = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), weights.params)
  is_quantized = lambda leaf: isinstance(leaf, Quantized)
  for keys, leaf in jax.tree_util.tree_leaves_with_path(weights.quantized, is_leaf=is_quantized):
    path = tuple(key.key for key in keys)
    original = dequantize(leaf, jnp.float32) if base is None else leaf_at(base, path)
    put_at(whole, path, np.asarray(original, np.float32))
  if base is not None:  # what was rounded to bfloat16
    for keys, leaf in jax.tree_util.tree_leaves_with_path(weights.params):
      path = tuple(key.key for key in keys)
      if leaf.dtype != jnp.float32:
        put_at(whole, path, np.asarray(leaf_at(base, path), np.float32))
  is_adapter = lambda leaf: isinstance(leaf, Adapter)
  for keys, adapter in jax.tree_util.tree_leaves_with_path(weights.lora, is_leaf=is_adapter):
    path = (*(key.key for key in keys[:-1]), "kernel")
    kernel = leaf_at(whole, path)
    flat = kernel.reshape(*adapter.a.shape[:-1], -1)
    new = np.stack([_merge_layer(flat[i], jax.tree.map(lambda leaf, i=i: leaf[i], adapter)) for i in range(len(flat))])
    if not np.isfinite(new).all():
      raise NumericsError(f"merging {'/'.join(path)} gives numbers that are not finite; the adapter is broken")
    put_at(whole, path, new.reshape(kernel.shape))
  return whole


def _merge_layer(kernel: np.ndarray, adapter: Adapter) -> np.ndarray:
  return np.asarray(_merged(kernel, adapter))


_merged = jax.jit(merged)


@jax.jit
def with_merged_banks(weights: Adapted) -> Adapted:
  """Returns the weights with the adapters of float experts in their matrices, which each token would make anew."""
  params = jax.tree.map(lambda leaf: leaf, weights.params)
  lora: dict[str, Any] = {}
  for keys, adapter in jax.tree_util.tree_leaves_with_path(
    weights.lora, is_leaf=lambda leaf: isinstance(leaf, Adapter)
  ):
    path = tuple(key.key for key in keys)
    kernel = (*path[:-1], "kernel")
    if adapter.a.ndim == 4 and has_at(params, kernel):
      put_at(params, kernel, merged(leaf_at(params, kernel), adapter))
    else:
      put_at(lora, path, adapter)
  return weights._replace(params=params, lora=lora)


def without_adapters(weights: Any) -> Any:
  """Returns the base of adapted weights, as what a model reads."""
  return weights._replace(lora={}) if isinstance(weights, Adapted) else weights
