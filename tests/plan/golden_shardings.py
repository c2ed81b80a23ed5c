"""How every parameter of a preset lies on its mesh, as text.

Writes tests/golden/sharding_MODEL_DEVICES.txt anew:  python -m tests.plan.golden_shardings
"""

import math
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import jax

from ultrathink_jax.config import Config, from_mapping
from ultrathink_jax.models.language_model import init_params, parameter_axes
from ultrathink_jax.parallel.mesh import axis_sizes
from ultrathink_jax.parallel.sharding import partition_spec

GOLDEN = Path(__file__).parent.parent / "golden"
CHOSEN = [("ultra3b", "v5p-64"), ("ultra13b", "v5p-64"), ("ultra52b", "v5p-64"), ("ultra390b", "v5p-512")]


class Line(NamedTuple):
  path: str
  shape: tuple[int, ...]
  spec: tuple
  bytes: int  # on one device

  @property
  def is_whole(self) -> bool:
    return self.bytes == 4 * math.prod(self.shape)

  def __str__(self) -> str:
    shape = " x ".join(map(str, self.shape))
    spec = ", ".join(axis or "-" for axis in self.spec)
    return f"{self.path:<44} {shape:<24} [{spec}]".ljust(96) + f" {self.bytes:>13,}"


def preset_config(model: str, preset: str) -> Config:
  return from_mapping(import_module(f"configs.{model}").get_config(preset).to_dict())


def num_devices(preset: str) -> int:
  return int(preset.rsplit("-", 1)[1])


@cache
def lines(model: str, preset: str) -> list[Line]:
  """Returns the parameters in order of their paths."""
  config = preset_config(model, preset)
  sizes = axis_sizes(config.mesh, num_devices(preset))
  params = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
  found = []

  def add(path, leaf, axes):
    spec = tuple(partition_spec(axes))
    ways = math.prod(sizes[axis] for axis in spec if axis is not None)
    found.append(Line("/".join(key.key for key in path), leaf.shape, spec, 4 * leaf.size // ways))

  jax.tree_util.tree_map_with_path(add, params, parameter_axes(config.model))
  return found


def text(model: str, preset: str) -> str:
  found = lines(model, preset)
  total = f"{'bytes of parameters on one device':<96} {sum(line.bytes for line in found):>13,}"
  return "\n".join([*map(str, found), total]) + "\n"


def path_of(model: str, preset: str) -> Path:
  return GOLDEN / f"sharding_{model}_{preset}.txt"


if __name__ == "__main__":
  for each in CHOSEN:
    path_of(*each).write_text(text(*each))
