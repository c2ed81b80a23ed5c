"""Parameters of a new run taken from a checkpoint of another one, as far as they agree."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ultrathink_jax.errors import CheckpointError
from ultrathink_jax.train.checkpoint import Checkpoints
from ultrathink_jax.train.items import by_name, name_of, saved_shapes
from ultrathink_jax.types import Parameters

_MOST_NAMES = 4  # that a line lists


def initialize_from(path: Path, like: Parameters, log: Callable[[str], None]) -> Parameters:
  """Returns `like` with every parameter that the checkpoint has under the same name in the same shape, laid out alike.

  `path` is a workdir or its checkpoints, of which the newest intact one is taken, or one checkpoint. Averaged
  parameters come before others. What was taken, and what was not, is logged.

  Raises:
    CheckpointError: there is no checkpoint, it is damaged, or it has no parameter that fits.
  """
  directory, step = _find(path)
  with Checkpoints(directory, log=log) as checkpoints:
    step = checkpoints.newest_intact() if step is None else step
    if step is None:
      raise CheckpointError(f"checkpoint.init_from={path} holds no checkpoint; name a workdir that was trained")
    item = checkpoints.params_path(step)
  there = by_name(saved_shapes(item))
  wanted = by_name(like)
  taken = [name for name in wanted if name in there and there[name].shape == wanted[name].shape]
  other_shape = [name for name in wanted if name in there and name not in taken]
  missing = [name for name in wanted if name not in there]
  if not taken:
    raise CheckpointError(f"checkpoint.init_from={path} has no parameter that fits: {_nearest(wanted, there)}")
  log(
    f"[init] {len(taken)} of {len(wanted)} parameters from {path} step {step}"
    + _listed("not there", missing)
    + _listed("other shape", other_shape)
  )
  return _merge(item, like, set(taken))


def _find(path: Path) -> tuple[Path, int | None]:
  """Returns the directory of checkpoints and the step that `path` names."""
  if path.name.isdigit() and (path / "params").is_dir():
    return path.parent, int(path.name)
  return (path / "checkpoints" if (path / "checkpoints").is_dir() else path), None


def _merge(item: Path, like: Parameters, taken: set[str]) -> Parameters:
  """Returns `like` with the parameters named in `taken` read from `item`."""
  shapes = saved_shapes(item)

  def wanted(path: Any, leaf: Any) -> Any:
    name = name_of(path)
    if name not in taken:
      return ocp.PLACEHOLDER
    own = ours[name]
    return jax.ShapeDtypeStruct(own.shape, own.dtype, sharding=own.sharding)

  ours = by_name(like)
  tree = jax.tree_util.tree_map_with_path(wanted, shapes)
  arguments = ocp.checkpoint_utils.construct_restore_args(tree)
  with ocp.PyTreeCheckpointer() as checkpointer:
    restored = by_name(checkpointer.restore(item, args=ocp.args.PyTreeRestore(tree, restore_args=arguments)))
  return jax.tree_util.tree_map_with_path(lambda p, x: restored[name_of(p)] if name_of(p) in taken else x, like)


def _listed(title: str, names: list[str]) -> str:
  more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
  return f"; {title}: {', '.join(names[:_MOST_NAMES])}{more}" if names else ""


def _nearest(wanted: dict[str, Any], there: dict[str, Any]) -> str:
  """Returns some parameters that are wanted, each with the nearest that is there."""
  pairs = []
  for name in list(wanted)[:_MOST_NAMES]:
    near = difflib.get_close_matches(name, there, 1, cutoff=0.0)
    pairs.append(
      f"{name} {list(wanted[name].shape)} is nearest to {near[0]} {list(there[near[0]].shape)}" if near else name
    )
  return "; ".join(pairs)
