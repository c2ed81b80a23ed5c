"""What the parameters of a model are called where layers are not stacked: in files, in patterns, on the terminal."""

from typing import Any, NamedTuple

import jax

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.models.layer import layer_paths


class Place(NamedTuple):
  """Where a parameter is in the tree: the path of its leaf and, in a stack of layers, which of them."""

  path: tuple[str, ...]
  repeat: int | None


def places(model: ModelConfig, params: Any) -> dict[str, Place]:
  """Returns {name: place} of every parameter, layers first to last: embedding.table, layers.0.attention.out.kernel."""
  outside = {name: tree for name, tree in params.items() if not name.startswith("group_")}
  found = {".".join(path): Place(path, None) for path in _paths(outside)}
  for number, path, repeat in layer_paths(model):
    group, layer = path.split("/")
    for inner in _paths(params[group][layer]):
      found[_name(number, layer, ".".join(inner))] = Place((group, layer, *inner), repeat)
  return found


def leaf_at(tree: Any, path: tuple[str, ...]) -> Any:
  for name in path:
    tree = tree[name]
  return tree


def has_at(tree: Any, path: tuple[str, ...]) -> bool:
  for name in path:
    if name not in tree:
      return False
    tree = tree[name]
  return True


def put_at(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
  """Puts a leaf into a nested dict, which is made as deep as it must be."""
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = leaf


def _name(number: int, layer: str, inner: str) -> str:
  """Returns layers.NUMBER.norm.scale for the layer's norm and layers.NUMBER.MIXER.rest for what is inside its mixer."""
  mixer = layer.rsplit("_", 1)[0]
  return f"layers.{number}.{mixer + inner.removeprefix('mixer') if inner.startswith('mixer.') else inner}"


def _paths(tree: Any) -> list[tuple[str, ...]]:
  return [tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
