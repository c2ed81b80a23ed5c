"""Whether every number of a state is finite."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ultrathink_jax.errors import NumericsError


def require_finite(step: int, trees: dict[str, Any]) -> None:
  """Raises NumericsError, with the name of the first array, where a number is not finite; it waits for the arrays."""
  named = jax.tree_util.tree_leaves_with_path(trees)
  named = [(path, jnp.asarray(leaf)) for path, leaf in named if jnp.issubdtype(leaf.dtype, jnp.inexact)]
  finite = np.asarray(_are_finite([leaf for _, leaf in named], tuple(leaf.sharding for _, leaf in named)))
  bad = [path for (path, _), is_finite in zip(named, finite, strict=True) if not is_finite]
  if bad:
    name = jax.tree_util.keystr(bad[0], simple=True, separator="/")
    raise NumericsError(
      f"step {step} is not saved: {len(bad)} of {len(named)} arrays are not finite, the first is {name}; resume with a "
      f"lower optimizer.learning_rate or optimizer.clip_norm, or another train.seed"
    )


@partial(jax.jit, static_argnums=1)
def _are_finite(leaves: list[jax.Array], shardings: tuple[Any, ...]) -> jax.Array:
  """Returns for each array whether all of it is finite, known to every process."""
  finite = []
  for leaf, sharding in zip(leaves, shardings, strict=True):
    if sharding.memory_kind == "pinned_host":
      leaf = jax.device_put(leaf, sharding.with_memory_kind("device"))
    finite.append(jnp.isfinite(leaf).all())
  meshes = [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]
  stacked = jnp.stack(finite)
  return jax.lax.with_sharding_constraint(stacked, NamedSharding(meshes[0], PartitionSpec())) if meshes else stacked
