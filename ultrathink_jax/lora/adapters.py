"""Adapters as a run trains them, as a model reads them, and by name as files hold them.

A run trains a tree by the paths of the adapted modules with the leaves `lora_a` [R, (E,) D, r], `lora_b` [R, (E,) r, F]
and, for DoRA, `magnitude` [R, F], R being the adapted layers of a stack.
Letters: R layers  E experts  D in  F out  r rank.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ultrathink_jax.config import LoraConfig
from ultrathink_jax.kernels.svd import svd
from ultrathink_jax.layers.adapter import column_lengths
from ultrathink_jax.lora.named import NamedAdapter
from ultrathink_jax.lora.targets import Target
from ultrathink_jax.models.naming import leaf_at, put_at
from ultrathink_jax.types import Adapter, Parameters


def init_adapters(
  targets: Sequence[Target], lora: LoraConfig, key: Key[Array, ""], base: Parameters
) -> tuple[Parameters, Parameters]:
  """Returns the adapters that a run begins with, and for PiSSA those that are taken off, of which nothing is trained.

  A is uniform in +-1 / sqrt(D), as PyTorch's linear layers begin, and B is 0: nothing is added at first. With
  init=pissa A B is the part of rank r of the matrix that is nearest to it (arXiv:2404.02948), which is taken off again:
  the sum is the base, bit for bit, and what a step changes is the strongest part of it. There the paper, and PEFT,
  take it off the base itself, which is then another one.
  """
  adapters: dict[str, Any] = {}
  start: dict[str, Any] = {}
  for number, target in enumerate(targets):
    if lora.init == "pissa":
      a, b = _principal(kernel_of(base, target), target, lora)
      put_at(start, target.path, {"lora_a": a, "lora_b": b})
      leaves = {"lora_a": jnp.copy(a), "lora_b": jnp.copy(b)}
    else:
      bound = target.in_dim**-0.5
      shape = *target.lead, target.in_dim, target.rank
      a = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound)
      leaves = {"lora_a": a * _has_column(target), "lora_b": jnp.zeros((*target.lead, target.rank, target.out_dim))}
    if lora.variant == "dora":
      leaves["magnitude"] = column_lengths(kernel_of(base, target))
    put_at(adapters, target.path, leaves)
  return adapters, start


def kernel_of(base: Parameters, target: Target) -> Float[Array, "R *E D F"]:
  """Returns the weight matrices of the adapted layers."""
  kernel = leaf_at(base, (*target.path, "kernel"))
  chosen = kernel if target.is_whole else kernel[np.array(target.repeats)]
  return chosen.reshape(*target.lead, target.in_dim, target.out_dim)


def _has_column(target: Target) -> Float[np.ndarray, "R *E 1 r"]:
  """Returns 1 for the columns of A that a layer has, and 0 beyond its own rank."""
  has = np.arange(target.rank) < np.array(target.ranks)[:, None]
  return has.astype(np.float32).reshape(len(target.repeats), *([1] * (len(target.lead) - 1)), 1, target.rank)


def _principal(kernel: Array, target: Target, lora: LoraConfig) -> tuple[Array, Array]:
  left, values, right = svd(kernel)
  scale = jnp.array(scales(target, lora)).reshape(-1, *([1] * (len(target.lead) - 1)), 1)
  root = jnp.sqrt(values[..., : target.rank] / scale)
  has = _has_column(target)
  return left[..., : target.rank] * root[..., None, :] * has, root[..., None] * right[..., : target.rank, :]


def scales(target: Target, lora: LoraConfig) -> Float[np.ndarray, " R"]:
  """Returns what the adapter of each adapted layer counts."""
  pairs = zip(target.ranks, target.alphas, strict=True)
  return np.array([lora.scale(rank, alpha) for rank, alpha in pairs], np.float32)


def attach(
  targets: Sequence[Target], lora: LoraConfig, adapters: Parameters, start: Parameters, is_training: bool
) -> Parameters:
  """Returns the collection that a model reads: an Adapter for every stack, of zeros where a layer has none."""
  collection: dict[str, Any] = {}
  for target in targets:
    leaves = {name: _in_stack(leaf, target) for name, leaf in leaf_at(adapters, target.path).items()}
    first = {name: _in_stack(leaf, target) for name, leaf in leaf_at(start, target.path).items()} if start else {}
    dropout = np.full(target.stack, lora.dropout, np.float32) if is_training and lora.dropout else None
    adapter = Adapter(
      leaves["lora_a"],
      leaves["lora_b"],
      _in_stack(jnp.array(scales(target, lora)), target),
      leaves.get("magnitude"),
      None if dropout is None else jnp.array(dropout),
      first.get("lora_a"),
      first.get("lora_b"),
    )
    put_at(collection, (*target.path, "adapter"), adapter)
  return collection


def _in_stack(leaf: Array, target: Target) -> Array:
  if target.is_whole:
    return leaf
  return jnp.zeros((target.stack, *leaf.shape[1:]), leaf.dtype).at[np.array(target.repeats)].set(leaf)


def adapter_axes(targets: Sequence[Target], lora: LoraConfig) -> tuple[Any, Any]:
  """Returns the logical axes of what `init_adapters` returns. Layers that are a part of a stack lie on all devices."""
  axes: dict[str, Any] = {}
  start: dict[str, Any] = {}
  for target in targets:
    *lead, inner, outer = target.axes
    if not target.is_whole:
      lead[0] = None
    factors = {"lora_a": (*lead, inner, None), "lora_b": (*lead, None, outer)}
    put_at(axes, target.path, factors | ({"magnitude": (*lead, outer)} if lora.variant == "dora" else {}))
    if lora.init == "pissa":
      put_at(start, target.path, factors)
  return axes, start


def to_named(
  targets: Sequence[Target], lora: LoraConfig, adapters: Parameters, start: Parameters
) -> dict[str, NamedAdapter]:
  """Returns the adapters by the names of their kernels in files, each of its own rank.

  What PiSSA takes off is a second half of the rank, with a B of the other sign.
  """
  named = {}
  for target in targets:
    leaves = jax.tree.map(np.asarray, leaf_at(adapters, target.path))
    first = jax.tree.map(np.asarray, leaf_at(start, target.path)) if start else None
    for i, name in enumerate(target.names):
      rank, alpha = target.ranks[i], target.alphas[i]
      a, b = leaves["lora_a"][i, ..., :rank], leaves["lora_b"][i, ..., :rank, :]
      if first is not None:
        a = np.concatenate([a, first["lora_a"][i, ..., :rank]], axis=-1)
        b = np.concatenate([b, -first["lora_b"][i, ..., :rank, :]], axis=-2)
        alpha *= math.sqrt(2) if lora.scaling == "rslora" else 2
      magnitude = leaves["magnitude"][i] if "magnitude" in leaves else None
      named[f"{name}.kernel"] = NamedAdapter(a, b, alpha, magnitude)
  return named


def from_named(targets: Sequence[Target], named: dict[str, NamedAdapter]) -> Parameters:
  """Returns the tree of adapters that hold what `named` does; every target has one there of its rank."""
  adapters: dict[str, Any] = {}
  for target in targets:
    of = [named[f"{name}.kernel"] for name in target.names]
    pad = lambda array, axis, rank=target.rank: np.pad(
      array, [(0, rank - array.shape[axis] if dim == axis % array.ndim else 0) for dim in range(array.ndim)]
    )
    leaves = {
      "lora_a": np.stack([pad(each.a, -1) for each in of]),
      "lora_b": np.stack([pad(each.b, -2) for each in of]),
    }
    if of[0].magnitude is not None:
      leaves["magnitude"] = np.stack([each.magnitude for each in of])
    put_at(adapters, target.path, jax.tree.map(jnp.asarray, leaves))
  return adapters
