"""Where each logical axis of an array lies on the mesh: one table, read by parameters and activations alike."""

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
  "mlp": "tensor",
  "expert": "expert",
  "vocab": "tensor",
  "layers": "pipe",
  "state": None,
}


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
  """Returns the mesh axes of logical `axes`; an unknown name raises KeyError."""
  return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
  """Returns x laid out by its logical axes on the mesh set with jax.set_mesh; without one, x."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def tree_shardings(mesh: Mesh, axes: Any) -> Any:
  """Returns the sharding of every leaf of a tree of logical axis tuples."""
  is_axes = lambda leaf: isinstance(leaf, tuple) and all(name is None or isinstance(name, str) for name in leaf)
  return jax.tree.map(lambda names: NamedSharding(mesh, partition_spec(names)), axes, is_leaf=is_axes)


def optimizer_shardings(
  mesh: Mesh, optimizer: optax.GradientTransformation, opt_state: Any, param_shardings: Any
) -> Any:
  """Returns shardings for an optimizer state (or its shapes): moments lie like their parameters, counts everywhere.

  Without this `jax.jit(optimizer.init)` would replicate the moments on every device.
  """
  return optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, sharding: sharding,
    opt_state,
    param_shardings,
    transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
  )
