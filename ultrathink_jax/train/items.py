"""The arrays of a checkpoint's item by their names, as layers/moe_0/router."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ultrathink_jax.errors import CheckpointError
from ultrathink_jax.train.storage_errors import describe


def name_of(path: Any) -> str:
  """Returns the name of a leaf of a tree by its path there, the same in a tree that Orbax has written and read."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def by_name(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree."""
  return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def saved_shapes(item: Path) -> Any:
  """Returns the tree of an item, with shapes and types for arrays. Raises CheckpointError."""
  try:
    return ocp.StandardCheckpointHandler().metadata(item).tree
  except Exception as error:  # Orbax raises many kinds
    raise CheckpointError(f"{item} cannot be read: {describe(error)}") from error


def require_alike(item: Path, like: Any) -> None:
  """Raises CheckpointError where an item does not have exactly the arrays of `like`, in their shapes."""
  there, wanted = ({name: tuple(x.shape) for name, x in by_name(tree).items()} for tree in (saved_shapes(item), like))
  for name in sorted(there.keys() | wanted.keys()):
    if there.get(name) != wanted.get(name):
      saved, own = (f"has shape {list(shapes[name])}" if name in shapes else "is not" for shapes in (there, wanted))
      raise CheckpointError(
        f"checkpoint {item.parent} is of another model or optimizer: {item.name}/{name} {saved} there and {own} here"
      )
