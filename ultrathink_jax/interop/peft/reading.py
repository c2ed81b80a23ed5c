"""Reads an adapter directory: keys to our names, tensors to our layouts, what we do not know refused by name.

Letters: E experts  r rank; in, out: dims of a matrix. lora_A is [r, in] and lora_B [out, r]; of a bank see packing.py.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.errors import CheckpointError, ConfigError
from ultrathink_jax.interop.families import Family
from ultrathink_jax.interop.families.family import BANK, Entry, their_shape, to_ours
from ultrathink_jax.interop.families.pattern import letters_of
from ultrathink_jax.interop.peft.adapter import WEIGHTS_FILE, PeftAdapter, require_held
from ultrathink_jax.interop.peft.modules import (
  HEAD,
  PREFIX,
  Modules,
  is_matrix,
  is_of_experts,
  matrix_dims,
  read_modules,
)
from ultrathink_jax.interop.peft.packing import split, unpack_bank
from ultrathink_jax.interop.peft.settings import Settings, read_settings
from ultrathink_jax.interop.pretrained import named_shapes
from ultrathink_jax.interop.shards import Stored, read_tensors
from ultrathink_jax.lora.named import NamedAdapter

_KEY = re.compile(r"(?P<path>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)(\.weight)?$")
_UNREAD = {
  ".lora_B.bias": "lora_bias is not computed here",
  ".lora_embedding_": "adapters of embeddings are not computed here; train the table in full (modules_to_save)",
}


class Place(NamedTuple):
  """What one path of the file stands beside, and its name for PEFT's patterns."""

  entry: Entry
  target: str


def read_adapter(directory: Path, model: ModelConfig, family: Family) -> PeftAdapter:
  """Returns the adapter of a directory for `model`, which `family` holds.

  Experts may be apart, as PEFT wrote them up to transformers 4, or fused.

  Raises:
    CheckpointError: a file is missing or damaged, or tensors are missing, unknown or of another shape.
    ConfigError: it asks for what we do not compute.
  """
  require_held(model, family)
  settings = read_settings(directory)
  tensors = _read_file(directory / WEIGHTS_FILE)
  shapes = named_shapes(model)
  modules = read_modules(family, letters_of(model), shapes)
  factors: dict[str, dict[str, np.ndarray]] = {}
  whole: dict[str, np.ndarray] = {}
  for name, tensor in tensors.items():
    if not name.startswith(PREFIX):
      raise CheckpointError(f"{directory}: {name} does not begin with {PREFIX}")
    for part, reason in _UNREAD.items():
      if part in name:
        raise ConfigError(f"{directory}: {name}: {reason}")
    if found := _KEY.match(name.removeprefix(PREFIX)):
      factors.setdefault(found["path"], {})[found["kind"]] = tensor
    else:  # of a module that is adapted too, PEFT keeps the weight as that of its base_layer
      whole[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
  adapters = _read_factors(directory, settings, modules, shapes, factors)
  if model.tie_embeddings:
    _require_tie(directory, modules, whole)
  trained = _read_whole(directory, modules, shapes, whole)
  return PeftAdapter(adapters, trained, settings.is_rslora, settings.base, settings.dropout)


def _read_file(path: Path) -> dict[str, np.ndarray]:
  if not path.is_file() and path.with_suffix(".bin").is_file():
    raise CheckpointError(f"{path.with_suffix('.bin')} is pickled, which can run any code; convert it to safetensors")
  try:
    with safe_open(path, "numpy") as file:
      headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
      stored = {name: Stored(path, tuple(h.get_shape()), h.get_dtype()) for name, h in headers.items()}
  except (OSError, SafetensorError) as error:
    raise CheckpointError(f"{path} cannot be read: {error}") from error
  return dict(read_tensors(stored))


def _read_factors(
  directory: Path,
  settings: Settings,
  modules: Modules,
  shapes: dict[str, Any],
  factors: dict[str, dict[str, np.ndarray]],
) -> dict[str, NamedAdapter]:
  """Returns the adapters by our names, from {path: {kind: tensor}}."""
  adapters: dict[str, NamedAdapter] = {}
  apart: dict[str, dict[int, NamedAdapter]] = {}
  for path, tensors in factors.items():
    place = _find(settings, modules, path)
    if place is None:
      raise CheckpointError(f"{directory}: {PREFIX}{path} is no module of {modules.family.architecture} to adapt")
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if settings.is_dora else set())
    if tensors.keys() != wanted:
      raise CheckpointError(
        f"{directory}: {path} has {sorted(tensors)}, and use_dora={settings.is_dora} wants {wanted}"
      )
    whole = _read_one(directory, settings, place, shapes, tensors)
    out_dims = matrix_dims(place.entry, shapes)[1]
    for name, part in zip(place.entry.parts, split(whole, out_dims, settings.is_rslora), strict=True):
      if part is not None and place.entry.expert is not None:
        apart.setdefault(name, {})[place.entry.expert] = part
      elif part is not None:
        adapters[name] = part
  return adapters | {name: _stack(directory, name, shapes[name].shape[0], found) for name, found in apart.items()}


def _find(settings: Settings, modules: Modules, path: str) -> Place | None:
  """Returns what a path stands beside: an nn.Linear, one expert's, a parameter, or a bank inside `depth` wrappers."""
  module = path
  while module.endswith(".base_layer"):
    module = module.removesuffix(".base_layer")
  depth = (len(path) - len(module)) // len(".base_layer")
  entry = modules.tensor(f"{module}.weight")
  if entry is not None and is_matrix(entry) and not depth:
    return Place(entry, f"{module}.weight" if settings.is_parameter(f"{module}.weight") else module)
  banks = modules.wrapped(module)
  targeted = [name for name in banks if settings.is_parameter(f"{module}.{name}")]
  if depth >= len(targeted):
    return None
  settings.require_banks()
  name = targeted[len(targeted) - 1 - depth]
  return Place(banks[name], f"{module}.{name}")


def _read_one(
  directory: Path, settings: Settings, place: Place, shapes: dict[str, Any], tensors: dict[str, np.ndarray]
) -> NamedAdapter:
  """Returns the adapter of one of their tensors. Raises CheckpointError where a shape is not what it must be."""
  entry, target = place
  if settings.is_dora and is_of_experts(entry):
    raise ConfigError(f"{directory}: {target} has a DoRA magnitude, which experts' adapters cannot have")
  in_dim, out_dims = matrix_dims(entry, shapes)
  num_experts = shapes[entry.parts[0]].shape[0] if entry.transform == BANK else 1
  rank, alpha = settings.rank_of(target), settings.alpha_of(target)
  expected = {"lora_A": (num_experts * rank, in_dim), "lora_B": (sum(out_dims), rank * num_experts)}
  expected["lora_magnitude_vector"] = (sum(out_dims),)
  for kind, tensor in tensors.items():
    if tensor.shape != expected[kind]:
      raise CheckpointError(
        f"{directory}: {target}: {kind} has shape {tensor.shape}; rank {rank} and the model want {expected[kind]}"
      )
  if entry.transform == BANK:
    a, b = unpack_bank(tensors["lora_A"], tensors["lora_B"], num_experts)
  else:
    a, b = tensors["lora_A"].T, tensors["lora_B"].T
  return NamedAdapter(a, b, alpha, tensors.get("lora_magnitude_vector"))


def _stack(directory: Path, name: str, num_experts: int, found: dict[int, NamedAdapter]) -> NamedAdapter:
  """Returns the adapter of a bank from those of its experts, which must all be there and alike."""
  if len(found) < num_experts:
    raise CheckpointError(f"{directory}: {name}: experts {sorted(found)} of {num_experts} are adapted; it takes all")
  kinds = {(one.rank, one.alpha) for one in found.values()}
  if len(kinds) > 1:
    raise CheckpointError(f"{directory}: {name}: experts have ranks and alphas {sorted(kinds)}; it takes one for all")
  experts = [found[expert] for expert in range(num_experts)]
  return NamedAdapter(np.stack([one.a for one in experts]), np.stack([one.b for one in experts]), experts[0].alpha)


def _read_whole(
  directory: Path, modules: Modules, shapes: dict[str, Any], tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns the parameters trained in full, from tensors by their names in the file."""
  arrays: dict[str, np.ndarray] = {}
  experts: dict[str, set[int]] = {}
  for name, tensor in tensors.items():
    entry = modules.tensor(name)
    if entry is None:
      raise CheckpointError(f"{directory}: {PREFIX}{name} is no tensor of {modules.family.architecture}")
    if tensor.shape != their_shape(entry, shapes):
      raise CheckpointError(
        f"{directory}: {name} has shape {tensor.shape}; the base model has {their_shape(entry, shapes)}"
      )
    for part in entry.parts:
      arrays.setdefault(part, np.empty(shapes[part].shape, np.float32))
      if entry.expert is not None:
        experts.setdefault(part, set()).add(entry.expert)
    to_ours(entry, tensor, arrays)
  for part, found in experts.items():
    if len(found) < shapes[part].shape[0]:
      raise CheckpointError(f"{directory}: {part}: experts {sorted(found)} of {shapes[part].shape[0]} are there")
  return arrays


def _require_tie(directory: Path, modules: Modules, whole: dict[str, np.ndarray]) -> None:
  """Drops the projection to the vocabulary, which must be the table: PEFT has a copy of each.

  Raises:
    ConfigError: one of them was trained and is not the other any more.
  """
  head = whole.pop(f"{HEAD}.weight", None)
  is_table = lambda name: (entry := modules.tensor(name)) is not None and entry.parts == ("embedding.table",)
  table = next((tensor for name, tensor in whole.items() if is_table(name)), None)
  if (head is None) != (table is None) or (head is not None and not np.array_equal(head, table)):
    raise ConfigError(
      f"{directory}: embed_tokens or lm_head was trained and the other is not the same, but the model ties them; "
      "train both with ensure_weight_tying"
    )
