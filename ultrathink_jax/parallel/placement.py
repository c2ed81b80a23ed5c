"""Arrays between this process's memory and a mesh that several processes share. Letters: B batch."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from ultrathink_jax.parallel.mesh import BATCH_AXES


def rows_here(mesh: Mesh, num_rows: int) -> Int[np.ndarray, "rows"]:
  """Returns, in ascending order, which rows of a batch of `num_rows` lie on devices of this process."""
  rows = np.arange(num_rows)
  parts = NamedSharding(mesh, PartitionSpec(BATCH_AXES)).addressable_devices_indices_map((num_rows,)).values()
  return np.unique(np.concatenate([rows[part] for part in parts]))


def place(mesh: Mesh, batch: Any, num_rows: int) -> Any:
  """Returns the global batch of `num_rows`, of which every process gives its `rows_here`.

  Rows lie over the batch axes and positions, the second dim, over context. The result is the same, bit for bit,
  however many processes there are.
  """
  rows = rows_here(mesh, num_rows)

  def lay(array: np.ndarray) -> jax.Array:
    def part(index: tuple[slice, ...]) -> np.ndarray:
      start, stop, _ = index[0].indices(num_rows)
      first = int(np.searchsorted(rows, start))
      return array[(slice(first, first + stop - start), *index[1:])]

    sharding = NamedSharding(mesh, PartitionSpec(*(BATCH_AXES, "context")[: array.ndim]))
    return jax.make_array_from_callback((num_rows, *array.shape[1:]), sharding, part)

  return jax.tree.map(lay, batch)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the layout of arrays that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def gather(mesh: Mesh, tree: Any) -> Any:
  """Returns the whole of arrays that lie over the mesh, on one device of this process; all processes call it."""
  whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
  return jax.tree.map(lambda x: x.addressable_data(0), whole)
