"""Models as a directory of safetensors: one tensor a weight, layers unstacked and numbered, no pickle.

config.json                    {"format": "ultrathink_jax", "model": the ModelConfig}
model.safetensors              embedding.table, layers.0.norm.scale, layers.0.mamba.gate.kernel, ...
model-00001-of-00003.safetensors and model.safetensors.index.json where the weights exceed 5 GB
tokenizer files
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ultrathink_jax.config import ModelConfig, from_mapping
from ultrathink_jax.data.tokenizer import Tokenizer, load_tokenizer
from ultrathink_jax.errors import CheckpointError, ConfigError
from ultrathink_jax.interop.shards import find_tensors, read_tensors, write_tensors
from ultrathink_jax.models.language_model import parameter_shapes
from ultrathink_jax.models.naming import leaf_at, places
from ultrathink_jax.types import Parameters

FORMAT = "ultrathink_jax"


def save_pretrained(directory: Path, model: ModelConfig, params: Parameters, tokenizer: Tokenizer) -> None:
  """Writes the model to `directory`, which is made."""
  directory.mkdir(parents=True, exist_ok=True)
  arrays = unstack(model, jax.tree.map(np.asarray, params))
  shapes = {name: array.shape for name, array in arrays.items()}
  write_tensors(directory, shapes, arrays.__getitem__, {"format": FORMAT})
  config = {"format": FORMAT, "model": dataclasses.asdict(model)}
  (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  tokenizer.save(directory)


def load_pretrained(directory: Path) -> tuple[ModelConfig, Parameters, Tokenizer]:
  """Returns what `save_pretrained` wrote.

  Raises:
    CheckpointError: a file is missing or damaged, or tensors are missing, unknown or of another shape.
  """
  model = read_model(directory)
  stored = find_tensors(directory)
  params = empty_params(model)
  arrays = unstack(model, params)
  require_same_tensors(directory, {name: entry.shape for name, entry in stored.items()}, arrays)
  for name, tensor in read_tensors(stored):
    arrays[name][...] = tensor
  return model, to_device(params), load_tokenizer(directory)


def read_model(directory: Path) -> ModelConfig:
  """Returns the model that `save_pretrained` wrote to `directory`. Raises CheckpointError."""
  try:
    return from_mapping(json.loads((directory / "config.json").read_text())["model"], ModelConfig, "model.")
  except (OSError, KeyError, json.JSONDecodeError, ConfigError) as error:
    raise CheckpointError(f"{directory} does not hold a saved model: {type(error).__name__}: {error}") from error


def require_same_tensors(directory: Path, found: dict[str, tuple[int, ...]], expected: dict[str, Any]) -> None:
  """Raises CheckpointError where names or shapes are not those `expected`, a dict of arrays or of their shapes."""
  for problem, names in (("lacks", expected.keys() - found.keys()), ("has unknown", found.keys() - expected.keys())):
    if names:
      more = f" and {len(names) - 8} more" if len(names) > 8 else ""
      raise CheckpointError(f"{directory} {problem} {len(names)} tensors: {', '.join(sorted(names)[:8])}{more}")
  for name, like in expected.items():
    shape = tuple(getattr(like, "shape", like))
    if found[name] != shape:
      raise CheckpointError(f"{directory}: {name} has shape {found[name]}; the model's config wants {shape}")


def empty_params(model: ModelConfig) -> Parameters:
  """Returns uninitialised parameters on the host, to be filled."""
  return jax.tree.map(lambda like: np.empty(like.shape, np.float32), _shapes(model))


def to_device(params: Parameters) -> Parameters:
  return jax.tree.map(jax.numpy.asarray, params)


def named_shapes(model: ModelConfig) -> dict[str, Any]:
  """Returns {name in files: shape and dtype}; allocates nothing."""
  return jax.eval_shape(lambda params: unstack(model, params), _shapes(model))


def _shapes(model: ModelConfig) -> Any:
  return parameter_shapes(model)


def unstack(model: ModelConfig, params: Parameters) -> dict[str, Any]:
  """Returns {name in files: array}, layers first to last; of numpy arrays, views."""
  leaf = lambda place: leaf_at(params, place.path)
  return {
    name: leaf(place) if place.repeat is None else leaf(place)[place.repeat]
    for name, place in places(model, params).items()
  }
