"""Where each logical axis of an array lies on the mesh: one table, read by parameters and activations alike."""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from ultrathink_jax.parallel.mesh import BATCH_AXES

RULES: dict[str, tuple[str, ...] | str | None] = {
  "batch": BATCH_AXES,
  "length": "context",
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "head_dim": None,
  "groups": "tensor",
  "mlp": "tensor",
  "expert": "expert",
  "vocab": "tensor",
  "layers": "pipe",
  "state": None,
  # of an array that has a slice for each device along an axis, as the copies of a gathered weight
  "each_data": "data",
  "each_fsdp": "fsdp",
  "each_context": "context",
}


def partition_spec(axes: tuple[str | None, ...], is_over_fsdp: bool = True) -> PartitionSpec:
  """Returns the mesh axes of logical `axes`; an unknown name raises KeyError."""
  spec = [None if axis is None else RULES[axis] for axis in axes]
  return PartitionSpec(*(None if name == "fsdp" and not is_over_fsdp else name for name in spec))


def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
  """Returns x laid out by its logical axes on the mesh set with jax.set_mesh; without one, x."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def is_spread() -> bool:
  """Returns whether a mesh of several devices is set."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and mesh.size > 1


def on_each_device(function: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
  """Returns `function` as run by every device on its own part of the arguments, whose logical axes are given.

  Inside, every mesh axis is manual: sizes are those of the parts, and devices meet only in collectives that `function`
  calls. Without a mesh of several devices it is `function`. None stands for an argument, or a result, that is None.
  """
  if not is_spread():
    return function
  specs = lambda tree: jax.tree.map(partition_spec, tree, is_leaf=_is_axes)
  return jax.shard_map(function, in_specs=specs(in_axes), out_specs=specs(out_axes), check_vma=False)


def _is_axes(leaf: Any) -> bool:
  return isinstance(leaf, tuple) and not hasattr(leaf, "_fields") and all(n is None or isinstance(n, str) for n in leaf)


def tree_shardings(mesh: Mesh, axes: Any, is_over_fsdp: bool = True) -> Any:
  """Returns the sharding of every leaf of a tree of logical axis tuples."""
  lay = lambda names: NamedSharding(mesh, partition_spec(names, is_over_fsdp))
  return jax.tree.map(lay, axes, is_leaf=_is_axes)


def fitted_shardings(mesh: Mesh, axes: Any, tree: Any, is_over_fsdp: bool = True) -> Any:
  """Returns `tree_shardings` with those dims of the leaves of `tree` whole that devices can not share evenly."""
  lay = lambda leaf, sharding: fitted(sharding, leaf.shape)
  return jax.tree.map(lay, tree, tree_shardings(mesh, axes, is_over_fsdp))


def constrain_tree(tree: Any, axes: Any, is_over_fsdp: bool) -> Any:
  """Returns the tree laid out by the logical axes of its leaves on the mesh set with jax.set_mesh, if any."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree
  lay = lambda names, x: jax.lax.with_sharding_constraint(x, partition_spec(names, is_over_fsdp))
  return jax.tree.map(lay, axes, tree, is_leaf=_is_axes)


def optimizer_shardings(
  mesh: Mesh, optimizer: optax.GradientTransformation, opt_state: Any, param_shardings: Any
) -> Any:
  """Returns shardings for an optimizer state (or its shapes): moments lie like `param_shardings`, counts everywhere.

  Of a moment with other dims than its parameter, as a factored one, those that devices can not share evenly are whole
  on each; all are where their number differs.

  Without this `jax.jit(optimizer.init)` would replicate the moments on every device.
  """
  return optax.tree_utils.tree_map_params(
    optimizer,
    lambda leaf, sharding: fitted(sharding, leaf.shape),
    opt_state,
    param_shardings,
    transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
  )


def fitted(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
  """Returns `sharding` with those dims of `shape` whole on each device that devices can not share evenly."""
  if len(sharding.spec) != len(shape):
    return NamedSharding(sharding.mesh, PartitionSpec())
  sizes = sharding.mesh.shape
  ways = lambda axes: math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
  spec = (axes if size % ways(axes) == 0 else None for axes, size in zip(sharding.spec, shape, strict=True))
  return NamedSharding(sharding.mesh, PartitionSpec(*spec))
