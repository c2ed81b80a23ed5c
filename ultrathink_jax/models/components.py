"""Which part of a model a parameter belongs to, by its path."""

from collections.abc import Sequence
from typing import Any

TRAINED_PARTS = ("lora", "trained")  # of what an adapted run trains, each a tree by the paths of the model
COMPONENTS = ("embedding", "attention", "mamba", "mlp", "experts", "router", "norm", "output")

_TOPS = {"embedding": "embedding", "unembedding": "output", "final_norm": "norm"}
_MIXERS = {"attention": "attention", "window": "attention", "mamba": "mamba", "mlp": "mlp", "moe": "experts"}


def component(path: Sequence[Any]) -> str:
  """Returns which of COMPONENTS the parameter at `path` is of.

  `path` are names, or the keys of jax.tree_util, as in group_0, moe_3, mixer, router, kernel. Norms inside a mixer are
  norms, the expert that every token passes is one of the experts, and a tied embedding is an embedding. Raises
  ValueError for a path that no model has.
  """
  names = [str(getattr(entry, "key", entry)) for entry in path]
  if names[0] in TRAINED_PARTS:
    names = names[1:]
  if names[0] in _TOPS:
    return _TOPS[names[0]]
  if any(name == "norm" or name.endswith("_norm") for name in names):
    return "norm"
  for name in names:
    kind, _, place = name.rpartition("_")
    if place.isdigit() and kind in _MIXERS:
      is_router = _MIXERS[kind] == "experts" and any("router" in inner for inner in names)
      return "router" if is_router else _MIXERS[kind]
  raise ValueError(f"no part of a model has a parameter at {'/'.join(names)}")
