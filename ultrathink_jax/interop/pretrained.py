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
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ultrathink_jax.config import ModelConfig, from_mapping
from ultrathink_jax.data.tokenizer import Tokenizer, load_tokenizer
from ultrathink_jax.errors import CheckpointError
from ultrathink_jax.models.language_model import init_params
from ultrathink_jax.models.layer import layer_paths
from ultrathink_jax.types import Parameters

FORMAT = "ultrathink_jax"
_MAX_FILE_BYTES = 5 * 10**9


def save_pretrained(directory: Path, model: ModelConfig, params: Parameters, tokenizer: Tokenizer) -> None:
  """Writes the model to `directory`, which is made."""
  directory.mkdir(parents=True, exist_ok=True)
  tensors = {name: np.asarray(leaf) for name, leaf in unstack(model, params).items()}
  files: list[dict[str, np.ndarray]] = [{}]
  for name, tensor in tensors.items():
    if files[-1] and sum(t.nbytes for t in files[-1].values()) + tensor.nbytes > _MAX_FILE_BYTES:
      files.append({})
    files[-1][name] = tensor
  names = ["model.safetensors"]
  if len(files) > 1:
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    weight_map = {tensor: name for name, file in zip(names, files, strict=True) for tensor in file}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
  for name, file in zip(names, files, strict=True):
    save_file(file, directory / name, {"format": FORMAT})
  config = {"format": FORMAT, "model": dataclasses.asdict(model)}
  (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  tokenizer.save(directory)


def load_pretrained(directory: Path) -> tuple[ModelConfig, Parameters, Tokenizer]:
  """Returns what `save_pretrained` wrote.

  Raises:
    CheckpointError: a file is missing or damaged, or tensors are missing, unknown or of another shape.
  """
  try:
    saved = json.loads((directory / "config.json").read_text())
    model = from_mapping(saved["model"], ModelConfig, "model.")
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("model*.safetensors")):
      with safe_open(path, "numpy") as file:
        tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
  except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
    raise CheckpointError(f"{directory} does not hold a saved model: {type(error).__name__}: {error}") from error
  return model, stack(model, tensors, str(directory)), load_tokenizer(directory)


def unstack(model: ModelConfig, params: Parameters) -> dict[str, Any]:
  """Returns {name in files: array}, layers first to last."""
  named = _flatten({name: tree for name, tree in params.items() if not name.startswith("group_")})
  for number, path, repeat in layer_paths(model):
    group, layer = path.split("/")
    leaves = _flatten(params[group][layer])
    named |= {_file_name(number, layer, name): leaf[repeat] for name, leaf in leaves.items()}
  return named


def stack(model: ModelConfig, tensors: dict[str, np.ndarray], origin: str) -> Parameters:
  """Returns the parameters of `tensors`, named as `unstack` names them.

  Raises:
    CheckpointError: names or shapes do not match the model.
  """
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  expected = jax.eval_shape(lambda params: unstack(model, params), shapes)
  for problem, names in (
    ("lacks", expected.keys() - tensors.keys()),
    ("has unknown", tensors.keys() - expected.keys()),
  ):
    if names:
      raise CheckpointError(f"{origin} {problem} {len(names)} tensors: {', '.join(sorted(names)[:5])}")
  for name, like in expected.items():
    if tensors[name].shape != like.shape:
      raise CheckpointError(f"{origin}: {name} has shape {tensors[name].shape}; the model's config wants {like.shape}")
  sources: dict[str, list[np.ndarray]] = {}
  for number, path, _ in layer_paths(model):
    group, layer = path.split("/")
    for name in _flatten(shapes[group][layer]):
      sources.setdefault(f"{group}.{layer}.{name}", []).append(tensors[_file_name(number, layer, name)])
  flat = {name: np.stack(sources[name]) if name in sources else tensors[name] for name in _flatten(shapes)}
  treedef = jax.tree.structure(shapes)
  return jax.tree.unflatten(treedef, [jax.numpy.asarray(leaf) for leaf in flat.values()])


def _file_name(number: int, layer: str, name: str) -> str:
  """Returns layers.NUMBER.norm.scale for the layer's norm and layers.NUMBER.MIXER.rest for what is inside its mixer."""
  mixer = layer.rsplit("_", 1)[0]
  return f"layers.{number}.{mixer + name.removeprefix('mixer') if name.startswith('mixer.') else name}"


def _flatten(tree: Any) -> dict[str, Any]:
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {".".join(key.key for key in path): leaf for path, leaf in paths}
