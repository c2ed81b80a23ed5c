"""Which weight matrices get an adapter, of which rank, from the names and patterns of a configuration."""

import difflib
import fnmatch
import math
from collections.abc import Callable
from typing import NamedTuple

from ultrathink_jax.config import Config, LoraConfig, ModelConfig
from ultrathink_jax.config.lora import split_pattern
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.models.language_model import parameter_axes, parameter_shapes
from ultrathink_jax.models.matrices import dict_path, flat_axes, matrix_dims
from ultrathink_jax.models.naming import Place, leaf_at, places


class Target(NamedTuple):
  """One stack of weight matrices [R, (E,) in_dim, out_dim] of which some layers have an adapter.

  Attributes:
    path: of the module that has the kernel: group_0, attention_0, mixer, query.
    names: of the adapted layers' modules, as files spell them: layers.0.attention.query.
    repeats: which layers of the stack these are.
    stack: how many layers it has.
    experts: matrices of a layer; 0 for one that is not of experts.
    ranks, alphas: of each adapted layer; arrays have the largest rank, and columns of 0 beyond a layer's own.
    axes: logical axes of the kernel with its input as one dim and its output as one.
  """

  path: tuple[str, ...]
  names: tuple[str, ...]
  repeats: tuple[int, ...]
  stack: int
  experts: int
  in_dim: int
  out_dim: int
  ranks: tuple[int, ...]
  alphas: tuple[float, ...]
  axes: tuple[str | None, ...]

  @property
  def rank(self) -> int:
    return max(self.ranks)

  @property
  def is_whole(self) -> bool:
    """Whether all layers of the stack are adapted."""
    return len(self.repeats) == self.stack

  @property
  def lead(self) -> tuple[int, ...]:
    """The dims before those of a matrix, of the adapted layers."""
    return (len(self.repeats), *([self.experts] if self.experts else []))


def _kind(name: str) -> str:
  return name.split(".")[2]


def _is_of_bank(name: str) -> bool:
  return _kind(name) == "moe" and name.count(".") == 3 and not _is_router(name)


def _is_router(name: str) -> bool:
  return _kind(name) == "moe" and name.endswith("router")


PRESETS: dict[str, Callable[[str], bool]] = {
  "attention": lambda name: _kind(name) in ("attention", "window"),
  "mlp": lambda name: _kind(name) == "mlp" or ".moe.shared." in name,
  "experts": _is_of_bank,
  "router": _is_router,
  "mamba": lambda name: _kind(name) == "mamba",
  "all": lambda name: not _is_router(name),
}


def find_targets(config: Config) -> list[Target]:
  """Returns the targets of a run, in the order of the parameters; none where lora.rank is 0.

  Raises:
    ConfigError: a pattern matches no weight matrix, or what is asked for is not defined.
  """
  lora = config.lora
  if not lora.rank:
    return []
  shapes, axes = parameter_shapes(config.model), parameter_axes(config.model)
  stacks: dict[tuple[str, ...], dict[int, str]] = {}
  for name, place in adaptable(config.model).items():
    stacks.setdefault(place.path, {})[place.repeat] = name
  names = [name for stack in stacks.values() for name in stack.values()]
  chosen = _chosen("lora.targets", lora.targets, names)
  ranks = _by_pattern("lora.rank_pattern", lora.rank_pattern, chosen)
  alphas = _by_pattern("lora.alpha_pattern", lora.alpha_pattern, chosen)
  own_rank = {name: int(ranks.get(name, _default_rank(lora, config.model, name))) for name in chosen}
  found = []
  for path, stack in stacks.items():
    adapted = {repeat: name for repeat, name in stack.items() if name in chosen}
    if adapted:
      leaf, of = leaf_at(shapes, path), tuple(adapted.values())
      dims = matrix_dims(dict_path(path), leaf)
      in_dims = leaf.shape[dims.stack : dims.stack + dims.rows]
      target = Target(
        path[:-1],
        of,
        tuple(adapted),
        len(stack),
        leaf.shape[1] if dims.stack == 2 else 0,
        math.prod(in_dims),
        math.prod(leaf.shape[dims.stack + dims.rows :]),
        tuple(own_rank[name] for name in of),
        tuple(alphas.get(name, lora.alpha) for name in of),
        flat_axes(leaf_at(axes, path), dims),
      )
      found.append(target)
  _check(lora, found)
  return found


def adaptable(model: ModelConfig) -> dict[str, Place]:
  """Returns {name: place of its kernel} of every module that can have an adapter: layers.0.attention.query, ..."""
  return {
    name.removesuffix(".kernel"): place
    for name, place in places(model, parameter_shapes(model)).items()
    if place.repeat is not None and name.endswith(".kernel") and ".conv_" not in name
  }


def _default_rank(lora: LoraConfig, model: ModelConfig, name: str) -> int:
  if not _is_of_bank(name):
    return lora.rank
  return lora.expert_rank or max(1, lora.rank // model.experts_per_token)


def _check(lora: LoraConfig, targets: list[Target]) -> None:
  banks = [target for target in targets if target.experts]
  if banks and lora.dropout:
    raise ConfigError(
      f"lora.dropout={lora.dropout} with experts among lora.targets: adapters of experts are part of their matrices, "
      "before which nothing can be dropped; set lora.dropout=0.0"
    )
  if banks and lora.variant == "dora":
    raise ConfigError(
      "lora.variant='dora' with experts among lora.targets is not defined, in PEFT neither; choose lora.variant='lora' "
      "or targets without experts, as ('attention',)"
    )
  part = next((target for target in targets if not target.is_whole), None)
  if lora.variant == "dora" and part:
    raise ConfigError(
      f"lora.variant='dora' with targets that leave out layers of a stack, as {part.names[0]} is one of {part.stack}; "
      "choose lora.variant='lora' or patterns that hold for all layers"
    )
  for target in targets:
    limit = min(target.in_dim, target.out_dim)
    if lora.init == "pissa" and target.rank > limit:
      raise ConfigError(
        f"lora.init='pissa' of rank {target.rank} for {target.names[0]}, a matrix {target.in_dim} x {target.out_dim}: "
        f"it has {limit} singular vectors; set lora.rank_pattern=('*.{target.names[0].split('.')[-1]}={limit}',)"
      )


def _chosen(key: str, patterns: tuple[str, ...], names: list[str]) -> set[str]:
  chosen: set[str] = set()
  for pattern in patterns:
    matched = [name for name in names if _matches(pattern, name)]
    if not matched:
      raise ConfigError(f"{key} has {pattern!r}, which matches no weight matrix; {_nearest(pattern, names)}")
    chosen |= set(matched)
  return chosen


def _matches(pattern: str, name: str) -> bool:
  if pattern in PRESETS:
    return PRESETS[pattern](name)
  return fnmatch.fnmatchcase(name, pattern.removesuffix(".kernel"))


def _by_pattern(key: str, entries: tuple[str, ...], names: set[str]) -> dict[str, float]:
  """Returns the value of the first pattern that matches each name."""
  found: dict[str, float] = {}
  for entry in entries:
    pattern, value = split_pattern(key, entry)
    matched = [name for name in names if _matches(pattern, name)]
    if not matched:
      raise ConfigError(f"{key} has {pattern!r}, which matches no adapted matrix; {_nearest(pattern, sorted(names))}")
    found = dict.fromkeys(matched, value) | found
  return found


def _nearest(pattern: str, names: list[str]) -> str:
  """Returns what could have been meant: presets that match something, and the names nearest to the pattern."""
  presets = [preset for preset in PRESETS if any(map(PRESETS[preset], names))]
  near = difflib.get_close_matches(pattern, [*presets, *names], 3, 0.4) or names[:3]
  return f"near it are {', '.join(near)}; presets here are {', '.join(presets)}, and patterns as '*.query' work too"
