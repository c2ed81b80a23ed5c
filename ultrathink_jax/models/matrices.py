"""What of a parameter is a matrix, by its path.

Letters: m rows  n columns.
"""

import math
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from ultrathink_jax.models.components import TRAINED_PARTS

FACTORS = ("lora_a", "lora_b")  # leaves of an adapter


class MatrixDims(NamedTuple):
  """The dims of a leaf as a stack of matrices: how many count the matrices, then the rows, then the columns."""

  stack: int
  rows: int
  columns: int


def path_name(path: tuple[Any, ...]) -> str:
  """Returns the path of a leaf as names with slashes between them."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def model_path(path: tuple[Any, ...]) -> list[str]:
  """Returns the names of a path in the model; what an adapted run trains is one level deeper."""
  names = [key.key for key in path]
  return names[1:] if names[0] in TRAINED_PARTS else names


def is_matrix(path: tuple[Any, ...]) -> bool:
  """Returns True for leaves named "kernel" outside convolutions."""
  return path[-1].key == "kernel" and not path[-2].key.startswith("conv_")


def matrix_dims(path: tuple[Any, ...], leaf: Any) -> MatrixDims | None:
  """Returns how a leaf is a stack of matrices, or None: a vector, a convolution, or a row for every token.

  Kernels of a group are stacked over its repeats, and those of expert banks over experts too. A projection named "out"
  contracts all dims but the last, every other one the first.
  """
  names = model_path(path)
  is_factor = names[-1] in FACTORS
  if not (is_matrix(path) or is_factor) or names[-2] == "unembedding":
    return None
  stack = int(names[0].startswith("group_"))
  if len(names) > 2 and names[1].startswith("moe_") and leaf.ndim - stack == 3:
    stack += 1
  dims = leaf.ndim - stack
  if dims < 2:
    return None
  return MatrixDims(stack, dims - 1, 1) if names[-2] == "out" and not is_factor else MatrixDims(stack, 1, dims - 1)


def dict_path(names: tuple[str, ...]) -> tuple[Any, ...]:
  """Returns the names as the path of a leaf."""
  return tuple(jax.tree_util.DictKey(name) for name in names)


def flat_axes(axes: tuple[str | None, ...], dims: MatrixDims) -> tuple[str | None, ...]:
  """Returns the logical axes of a leaf whose rows are one dim, and whose columns: those that come first of each."""
  return (*axes[: dims.stack], axes[dims.stack], axes[dims.stack + dims.rows])


def as_matrices(leaf: Array, dims: MatrixDims) -> Float[Array, "*stack m n"]:
  """Returns the leaf with all dims of its rows, and all of its columns, as one."""
  stack, rows = leaf.shape[: dims.stack], leaf.shape[dims.stack : dims.stack + dims.rows]
  return leaf.reshape(*stack, math.prod(rows), -1)
