"""What is trained of a model that is frozen otherwise: whole parameters, or some layers or experts of a stack.

What is frozen is in no tree that is differentiated, so that it has neither a gradient nor a state of the optimizer.
"""

import difflib
import fnmatch
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.config.lora import QUANTIZED
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.kernels.quantized import Quantized, quantize
from ultrathink_jax.models.components import component
from ultrathink_jax.models.language_model import parameter_axes, parameter_shapes
from ultrathink_jax.models.layer import layer_paths
from ultrathink_jax.models.matrices import as_matrices, dict_path, flat_axes, matrix_dims
from ultrathink_jax.models.naming import Place, leaf_at, places, put_at
from ultrathink_jax.types import Parameters

_PRESETS = ("last:N", "head", "embedding", "norms", "router", "experts", "experts:K")


class Trained(NamedTuple):
  """A leaf of the parameters that is trained, or a part of it.

  Attributes:
    repeats: which layers of the stack; None: all, or there is no stack.
    experts: which experts of a bank; None: all, or it is none.
  """

  path: tuple[str, ...]
  repeats: tuple[int, ...] | None
  experts: tuple[int, ...] | None

  @property
  def is_whole(self) -> bool:
    return self.repeats is None and self.experts is None


def find_trained(model: ModelConfig, patterns: Sequence[str]) -> list[Trained]:
  """Returns what the patterns of train.trainable choose. Raises ConfigError where one matches nothing."""
  shapes = parameter_shapes(model)
  all_places = places(model, shapes)
  repeats: dict[tuple[str, ...], set[int]] = {}
  experts: dict[tuple[str, ...], tuple[int, ...] | None] = {}
  for pattern in patterns:
    names, step = _chosen(model, pattern, all_places)
    for name in names:
      path, repeat = all_places[name]
      repeats.setdefault(path, set()).add(-1 if repeat is None else repeat)
      some = None if step is None else tuple(range(0, model.num_experts, step))
      experts[path] = some if experts.get(path, some) is not None else None
  found = []
  for path in dict.fromkeys(place.path for place in all_places.values()):
    if path in repeats:
      rows = tuple(sorted(repeats[path]))
      is_all = rows == (-1,) or len(rows) == leaf_at(shapes, path).shape[0]
      found.append(Trained(path, None if is_all else rows, experts[path]))
  return found


def _chosen(model: ModelConfig, pattern: str, all_places: dict[str, Place]) -> tuple[list[str], int | None]:
  """Returns the names that a pattern chooses, and K where it chooses every K-th expert of them."""
  names = list(all_places)
  number = re.fullmatch(r"(last|experts):([1-9]\d*)", pattern)
  num_layers = len(layer_paths(model))
  layer = lambda name: int(name.split(".")[1]) if name.startswith("layers.") else -1
  is_bank = lambda name: re.fullmatch(r"layers\.\d+\.moe\.(gate|up|down)\.kernel", name) is not None
  of = lambda kind: lambda name: component(all_places[name].path) == kind
  tests = {
    "head": lambda name: (
      name.startswith(("unembedding.", "final_norm.")) or (model.tie_embeddings and name.startswith("embedding."))
    ),
    "embedding": of("embedding"),
    "norms": of("norm"),
    "router": of("router"),
    "experts": of("experts"),
  }
  if number and number[1] == "last":
    if int(number[2]) > num_layers:
      raise ConfigError(f"train.trainable has {pattern!r}, and the model has {num_layers} layers; choose up to that")
    test = lambda name: layer(name) >= num_layers - int(number[2])
  elif number:
    test = is_bank
  else:
    test = tests.get(pattern, lambda name: fnmatch.fnmatchcase(name, pattern))
  chosen = [name for name in names if test(name)]
  if not chosen:
    near = difflib.get_close_matches(pattern, names, 3, 0.4) or names[:3]
    raise ConfigError(
      f"train.trainable has {pattern!r}, which matches no parameter; near it are {', '.join(near)}, and there are "
      f"{', '.join(_PRESETS)}"
    )
  return chosen, int(number[2]) if number and number[1] == "experts" else None


def take(trained: Sequence[Trained], base: Parameters) -> Parameters:
  """Returns what is trained, as a tree of its own."""
  tree: dict[str, Any] = {}
  for each in trained:
    leaf = leaf_at(base, each.path)
    put_at(tree, each.path, leaf if each.is_whole else leaf[_index(each, leaf)])
  return tree


def place(trained: Sequence[Trained], frozen: Parameters, tree: Parameters) -> Parameters:
  """Returns the frozen parameters with what is trained in its place."""
  whole = jax.tree.map(lambda leaf: leaf, frozen)  # nested dicts of its own
  for each in trained:
    new = leaf_at(tree, each.path)
    if not each.is_whole:
      old = leaf_at(frozen, each.path)
      new = old.at[_index(each, old)].set(new)
    put_at(whole, each.path, new)
  return whole


def _index(each: Trained, leaf: Any) -> tuple[Any, ...]:
  repeats = np.arange(leaf.shape[0]) if each.repeats is None else np.array(each.repeats)
  return (repeats,) if each.experts is None else np.ix_(repeats, np.array(each.experts))


def trained_axes(model: ModelConfig, trained: Sequence[Trained]) -> Any:
  """Returns the logical axes of what `take` returns. A part of a stack, or of a bank, lies on all devices."""
  axes, tree = parameter_axes(model), {}
  for each in trained:
    own = list(leaf_at(axes, each.path))
    if each.repeats is not None:
      own[0] = None
    if each.experts is not None:
      own[1] = None
    put_at(tree, each.path, tuple(own))
  return tree


def freeze(trained: Sequence[Trained], base: Parameters, dtype: str) -> tuple[Parameters, Parameters]:
  """Returns the frozen float parameters, and the kernels in few bits that they then lack.

  What is trained as a whole is in neither. In another `dtype` than float32, weight matrices are kept in it and tables
  of tokens in bfloat16; routers, norms, convolutions and the other small parameters stay as they are, and so does a
  leaf of which a part is trained.
  """
  floats: dict[str, Any] = {}
  quantized: dict[str, Any] = {}
  whole = {each.path for each in trained if each.is_whole}
  part = {each.path for each in trained if not each.is_whole}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(base):
    path = tuple(key.key for key in keys)
    if path in whole:
      continue
    kind = None if dtype == "float32" or path in part else _kept_as(path, leaf, dtype)
    if kind in QUANTIZED:
      put_at(quantized, path, quantize(as_matrices(leaf, matrix_dims(dict_path(path), leaf)), kind))
    else:
      put_at(floats, path, leaf if kind is None else leaf.astype(jnp.bfloat16))
  return floats, quantized


def _kept_as(path: tuple[str, ...], leaf: Any, dtype: str) -> str | None:
  """Returns the format of a frozen leaf; None: as it is."""
  if path[0] in ("embedding", "unembedding"):
    return "bfloat16"
  is_router = path[-2].endswith("router")
  return None if is_router or matrix_dims(dict_path(path), leaf) is None else dtype


def frozen_axes(model: ModelConfig, trained: Sequence[Trained], dtype: str) -> tuple[Any, Any]:
  """Returns the logical axes of what `freeze` returns."""
  shapes, axes = parameter_shapes(model), parameter_axes(model)
  floats, quantized = jax.eval_shape(lambda base: freeze(trained, base, dtype), shapes)
  own = lambda keys: leaf_at(axes, tuple(key.key for key in keys))
  of_floats = jax.tree_util.tree_map_with_path(lambda keys, _: own(keys), floats)

  def of_kernel(keys: Any, kernel: Quantized) -> Quantized:
    path = tuple(key.key for key in keys)
    names = flat_axes(own(keys), matrix_dims(keys, leaf_at(shapes, path)))
    return jax.tree.map(lambda _: names, kernel)

  is_kernel = lambda leaf: isinstance(leaf, Quantized)
  return of_floats, jax.tree_util.tree_map_with_path(of_kernel, quantized, is_leaf=is_kernel)
