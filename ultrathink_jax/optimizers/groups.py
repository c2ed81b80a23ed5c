"""Which rule moves each parameter, how fast, and whether it decays."""

import difflib
import fnmatch
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from ultrathink_jax.config import OptimizerConfig
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.models.matrices import FACTORS, is_matrix, matrix_dims, path_name

ROUTER_BIAS = "router_bias"  # a leaf of this name follows the load of its layer, not a gradient
_OF_MATRICES = ("muon", "galore")  # rules for matrices alone; other leaves get AdamW's


class Group(NamedTuple):
  """How the optimizer treats a parameter.

  Attributes:
    rule: an optimizer's name, or `router_bias`.
    rate: factor of the learning rate.
    is_decayed: whether weight decay pulls at it.
  """

  rule: str
  rate: float
  is_decayed: bool


def groups(config: OptimizerConfig, params: Any) -> dict[str, Group]:
  """Returns the group of every parameter (arrays or shapes) by its path. Raises ConfigError as `rate_factors` does."""
  factors = rate_factors(config, params)
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = path_name(path)
    if is_router_bias(path):
      found[name] = Group(ROUTER_BIAS, 1.0, False)
    else:
      is_other = config.name in _OF_MATRICES and matrix_dims(path, leaf) is None
      found[name] = Group("adamw" if is_other else config.name, factors.get(name, 1.0), is_decayed(path))
  return found


def format_groups(found: Mapping[str, Group], params: Any) -> str:
  """Returns a table of the groups: leaves and parameters of each, and the path of its largest leaf."""
  sizes = {path_name(path): math.prod(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  leaves, parameters, largest = Counter(), Counter(), {}
  for name, group in found.items():
    leaves[group] += 1
    parameters[group] += sizes[name]
    if group not in largest or sizes[name] > sizes[largest[group]]:
      largest[group] = name
  rows = [("rule", "rate", "decay", "leaves", "parameters", "as")]
  for group, count in parameters.most_common():
    rate, decay = ("own" if group.rule == ROUTER_BIAS else f"x{group.rate:g}"), "yes" if group.is_decayed else "no"
    rows.append((group.rule, rate, decay, str(leaves[group]), f"{count:,}", largest[group]))
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def rate_factors(config: OptimizerConfig, params: Any) -> dict[str, float]:
  """Returns the factors of the learning rate, by path, of the parameters that a pattern of `rate_multipliers` matches.

  Raises:
    ConfigError: an entry is no PATTERN=FACTOR, or its pattern matches no parameter; the line names paths like it.
  """
  names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  factors: dict[str, float] = {}
  for entry in config.rate_multipliers:
    pattern, factor = _multiplier(entry)
    matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if names and not matched:
      near = difflib.get_close_matches(pattern.strip("*"), _parts(names), 3, 0.3) or sorted(_parts(names))[:3]
      raise ConfigError(
        f"optimizer.rate_multipliers: {pattern!r} matches no parameter; paths like it have {', '.join(near)}: "
        f"set --config.optimizer.rate_multipliers to patterns of whole paths, as '*{near[0]}*=0.1'"
      )
    factors = dict.fromkeys(matched, factor) | factors
  return factors


def _multiplier(entry: str) -> tuple[str, float]:
  pattern, _, text = entry.rpartition("=")
  try:
    factor = float(text)
  except ValueError:
    factor = math.nan
  if not pattern or not 0 <= factor < math.inf:
    raise ConfigError(
      f"optimizer.rate_multipliers has {entry!r}, which is not PATTERN=FACTOR with a factor of 0 or more; "
      f"write it like '*router*=0.1'"
    )
  return pattern, factor


def _parts(names: list[str]) -> set[str]:
  """Returns what paths are made of: each of their parts, and each path without its first."""
  return {part for name in names for part in name.split("/")} | {name.partition("/")[2] for name in names} - {""}


def is_router_bias(path: tuple[Any, ...]) -> bool:
  return path[-1].key == ROUTER_BIAS


def is_decayed(path: tuple[Any, ...]) -> bool:
  """Returns True for weight matrices: kernels outside convolutions, and the two factors of an adapter."""
  return is_matrix(path) or path[-1].key in FACTORS


def decay_mask(params: Any) -> Any:
  """Returns `is_decayed` of every leaf."""
  return jax.tree_util.tree_map_with_path(lambda path, _: is_decayed(path), params)
