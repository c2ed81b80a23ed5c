"""Models with layers added that compute nothing, so that behind every mixer is a feed-forward layer of one kind.

Architectures that pair the two have no other way to hold a pattern such as MMMMAFMMME. An added layer is all zeros: it
adds 0 to the residual stream, so the function of the model stays the same.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.interop.families.pattern import compact, letters_of
from ultrathink_jax.interop.pretrained import named_shapes

_ADDED_WIDTH = 64  # of feed-forward layers that the model does not have


class Padded(NamedTuple):
  """A model of pairs and, for each of its layers, the number of the layer of the original it holds, None if added."""

  model: ModelConfig
  sources: tuple[int | None, ...]


def pair_layers(model: ModelConfig) -> Padded:
  """Returns the model with a feed-forward layer behind every mixer: experts everywhere where it has any, else F.

  Raises:
    ConfigError: it has windows, or feed-forward layers that follow no mixer.
  """
  letters = letters_of(model)
  sources: list[int | None] = []
  for number, letter in enumerate(letters):
    if letter == "L":
      raise ConfigError(f"layer {number} attends to a window")
    if letter in "AM":
      sources += [number, None]
    elif sources and sources[-1] is None:
      sources[-1] = number
    else:
      raise ConfigError(f"layer {number} ({letter}) follows no attention or Mamba layer")
  feed_forward = "E" if "E" in letters else "F"
  paired = "".join(letters[source] + feed_forward for source in sources[::2])
  if paired == letters and (feed_forward == "F" or model.shared_expert_dim):
    return Padded(model, tuple(sources))
  changes: dict[str, object] = {"layers": compact(paired)}
  if "E" in letters:
    if "F" in letters and model.mlp_bias:
      raise ConfigError("model.mlp_bias=True, and shared experts have no bias")
    width = max(model.shared_expert_dim, model.mlp_dim if "F" in letters else 0)
    changes["shared_expert_dim"] = width or _ADDED_WIDTH
  elif "F" not in letters:
    changes["mlp_dim"] = _ADDED_WIDTH
  return Padded(dataclasses.replace(model, **changes), tuple(sources))


def pad_arrays(model: ModelConfig, padded: Padded, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the parameters of the padded model, named as in files, from those of `model`."""
  if padded.model == model:
    return arrays
  letters = letters_of(model)
  filled = {}
  for name, like in named_shapes(padded.model).items():
    source = _source_name(name, padded.sources, letters)
    array = arrays.get(source)
    if array is None:
      array = np.zeros(like.shape, np.float32)
    missing = [(0, size - have) for size, have in zip(like.shape, array.shape, strict=True)]
    filled[name] = np.pad(array, missing) if any(after for _, after in missing) else array
  return filled


def _source_name(name: str, sources: tuple[int | None, ...], letters: str) -> str:
  """Returns the name of the original's parameter that becomes `name`; one that does not exist where there is none."""
  if not name.startswith("layers."):
    return name
  _, number, rest = name.split(".", 2)
  source = sources[int(number)]
  if source is not None and letters[source] == "F":
    rest = rest.replace("moe.shared.", "mlp.")
  return f"layers.{source}.{rest}"
