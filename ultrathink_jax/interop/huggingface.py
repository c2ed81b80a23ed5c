"""Hugging Face directories: config.json and safetensors of an architecture in `families`, read and written.

Nothing is approximated: a model that no architecture computes exactly is refused, with the reason.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ultrathink_jax.config import ModelConfig, from_mapping
from ultrathink_jax.errors import CheckpointError, ConfigError
from ultrathink_jax.interop.families import FAMILIES, Family, keys
from ultrathink_jax.interop.families.family import Entry, their_shape, to_ours, to_theirs
from ultrathink_jax.interop.families.hybrid import GRANITE
from ultrathink_jax.interop.families.pattern import compact, letters_of
from ultrathink_jax.interop.padding import Padded, pad_arrays, pair_layers
from ultrathink_jax.interop.pretrained import empty_params, require_same_tensors, to_device, unstack
from ultrathink_jax.interop.shards import Stored, find_tensors, read_tensors, write_tensors
from ultrathink_jax.types import Parameters

_TIED = "lm_head.weight"
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # buffers that old files hold beside the weights
# Keys that say how a model is trained or run, not what it computes.
_FREE = (
  *(
    "dtype",
    "remat",
    "gather_ahead",
    "unroll",
    "attention_backend",
    "experts_backend",
    "ssd_backend",
    "mamba_chunk_tokens",
  ),
  *("capacity_factor", "router_noise", "router_noise_steps", "mamba_expand"),
)
_ATTENTION_KEYS = (
  *("num_heads", "num_kv_heads", "head_dim", "qk_norm", "qkv_clip", "attention_bias", "attention_scale"),
  *("attention_soft_cap", "attention_sinks", "position", "rope"),
)
_EXPERT_KEYS = (
  *("num_experts", "experts_per_token", "expert_dim", "shared_expert_dim", "router", "router_normalize"),
  *("router_multiplier", "router_bias", "expert_groups"),
)
_MAMBA_KEYS = (
  *("mamba_state_dim", "mamba_conv_width", "mamba_num_heads", "mamba_head_dim", "mamba_num_groups"),
  *("mamba_norm_groups", "mamba_bias", "mamba_conv_bias", "mamba_dt_min", "mamba_dt_max"),
)
_KEYS_OF_LETTERS = {
  "AL": _ATTENTION_KEYS,
  "L": ("window_tokens",),
  "F": ("mlp_dim", "mlp_bias"),
  "FE": ("mlp_activation",),
  "E": _EXPERT_KEYS,
  "M": _MAMBA_KEYS,
}
_KEYS_OF_SCALING = {
  "none": (),
  "linear": ("factor",),
  "dynamic": ("factor", "original_tokens"),
  "yarn": ("factor", "original_tokens", "beta_fast", "beta_slow", "attention_factor"),
  "llama3": ("factor", "original_tokens", "low_frequency_factor", "high_frequency_factor"),
}


class Export(NamedTuple):
  """What was written: the architecture, and parameters before and after layers of zeros were added."""

  family: Family
  parameters: int
  written: int


def is_huggingface(directory: Path) -> bool:
  """Returns whether config.json is of the transformers library."""
  try:
    return "model_type" in json.loads((directory / "config.json").read_text())
  except (OSError, json.JSONDecodeError):
    return False


def read_config(directory: Path) -> tuple[Family, ModelConfig]:
  """Returns the architecture and our model of a directory's config.json.

  Raises:
    CheckpointError: there is no such file.
    ConfigError: it describes a model that we do not compute.
  """
  path = directory / "config.json"
  try:
    values = json.loads(path.read_text())
  except (OSError, json.JSONDecodeError) as error:
    raise CheckpointError(f"{path} cannot be read: {error}") from error
  model_type = values.get("model_type")
  if model_type not in FAMILIES:
    raise ConfigError(f"{path}: model_type={model_type!r} is not one of {', '.join(FAMILIES)}")
  return FAMILIES[model_type], model_of(FAMILIES[model_type], values)


def model_of(family: Family, values: dict[str, Any]) -> ModelConfig:
  """Returns our model of config.json's values."""
  read = keys.NEUTRAL | family.read(values)
  return from_mapping(read | {"layers": compact(read["layers"])}, ModelConfig, "model.")


def load(directory: Path) -> tuple[ModelConfig, Parameters]:
  """Returns the model of a directory in float32; tensors are read one at a time.

  Raises:
    CheckpointError: a file is missing or damaged, or tensors are missing, unknown or of another shape.
    ConfigError: config.json describes a model that we do not compute.
  """
  family, model = read_config(directory)
  stored = _rename(family, find_tensors(directory))
  params = empty_params(model)
  arrays = unstack(model, params)
  tied = stored.pop(_TIED, None) if model.tie_embeddings else None
  entries = _matching_entries(family, model, arrays, stored)
  expected = {name: their_shape(entry, arrays) for name, entry in entries.items()}
  require_same_tensors(directory, {name: found.shape for name, (_, found) in stored.items()}, expected)
  names = {original: name for name, (original, _) in stored.items()}
  for original, tensor in read_tensors(dict(stored.values())):
    to_ours(entries[names[original]], tensor, arrays)
  if tied is not None:
    ((_, head),) = read_tensors({_TIED: tied[1]})
    if not np.array_equal(head, arrays["embedding.table"]):
      raise CheckpointError(f"{directory}: tie_word_embeddings is true, and {_TIED} is not the embedding table")
  return model, to_device(params)


def save(
  directory: Path, model: ModelConfig, params: Parameters, ids: dict[str, int], family: Family | None = None
) -> Export:
  """Writes the model as `family`, by default the plainest architecture that computes it exactly.

  `ids` are bos_token_id and eos_token_id.

  Raises:
    ConfigError: there is none, or `family` is not exact.
  """
  family, padded = find_exact(model, family)
  arrays = unstack(model, jax.tree.map(np.asarray, params))
  filled = pad_arrays(model, padded, arrays)
  directory.mkdir(parents=True, exist_ok=True)
  entries = family.entries(letters_of(padded.model), filled, is_fused=False)
  lost = filled.keys() - {part for entry in entries.values() for part in entry.parts}
  assert not lost, f"{family.model_type} has no row for {sorted(lost)[:5]}"
  shapes = {name: their_shape(entry, filled) for name, entry in entries.items()}
  write_tensors(directory, shapes, lambda name: to_theirs(entries[name], filled), {"format": "pt"})
  values = {
    "architectures": [family.architecture],
    "model_type": family.model_type,
    **family.write(padded.model),
    **ids,
    "pad_token_id": None,  # some classes would take a token for padding otherwise and never train it
  }
  (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")
  count = lambda named: sum(array.size for array in named.values())
  return Export(family, count(arrays), count(filled))


def find_exact(model: ModelConfig, family: Family | None = None) -> tuple[Family, Padded]:
  """Returns the plainest architecture, or `family`, that computes the model exactly, and the model as it holds it.

  Raises:
    ConfigError: there is none; the nearest one and what it lacks are named.
  """
  reasons: dict[str, list[str]] = {}
  unwritable = {}
  for candidate in [family] if family else FAMILIES.values():
    try:
      padded = pair_layers(model) if candidate is GRANITE else Padded(model, ())
      differences = _differences(padded.model, model_of(candidate, candidate.write(padded.model)))
    except ConfigError as error:
      unwritable[candidate.architecture] = [str(error)]
      continue
    if not differences:
      return candidate, padded
    reasons[candidate.architecture] = differences
  if family:
    raise ConfigError(
      f"{family.architecture} does not compute this model: {_join((reasons | unwritable)[family.architecture])}"
    )
  # Of hybrids the most general class tells most: the others stumble over the pattern already.
  letters = set(letters_of(model))
  if "M" in letters and len(letters) > 1:
    name = GRANITE.architecture
  else:
    name = min(reasons or unwritable, key=lambda name: len((reasons or unwritable)[name]))
  raise ConfigError(
    f"no transformers class computes this model exactly (nearest is {name}: {_join((reasons | unwritable)[name])}); "
    "our own format holds it"
  )


def _join(reasons: list[str]) -> str:
  return ", ".join(reasons[:4])


def _differences(model: ModelConfig, read_back: ModelConfig) -> list[str]:
  """Returns the keys that would change the function of the model, were it read back as `read_back`."""
  ours, theirs = _meaning(model), _meaning(read_back)
  return [
    f"model.{key}={value!r} would be {theirs.get(key)!r}"
    for key, value in ours.items()
    if not _is_same(value, theirs.get(key))
  ]


def _is_same(ours: Any, theirs: Any) -> bool:
  if isinstance(ours, float) and isinstance(theirs, float):
    return math.isclose(ours, theirs, rel_tol=1e-12)
  return ours == theirs


def _meaning(model: ModelConfig) -> dict[str, Any]:
  """Returns the keys that matter to what the model computes, in one spelling."""
  letters = letters_of(model)
  values = dataclasses.asdict(model) | {
    "layers": letters,
    "mamba_num_heads": model.mamba_heads,
    "attention_scale": model.attention_scale or model.head_dim**-0.5,
  }
  for owners, names in _KEYS_OF_LETTERS.items():
    if not set(owners) & set(letters):
      values = {key: value for key, value in values.items() if key not in names}
  rope = values.pop("rope", None)
  if rope and model.position == "rope":
    used = ("theta", "fraction", "scaling", *_KEYS_OF_SCALING[model.rope.scaling])
    values |= {f"rope.{key}": rope[key] for key in used}
  return {key: value for key, value in values.items() if key not in _FREE}


def _rename(family: Family, found: dict[str, Stored]) -> dict[str, tuple[str, Stored]]:
  """Returns {name of the rows: (name in the file, what is stored)}."""
  renamed = {}
  for original, stored in found.items():
    name = original
    for pattern, replacement in family.renames:
      name = re.sub(pattern, replacement, name)
    if not _COMPUTED.search(name):
      renamed[name] = (original, stored)
  return renamed


def _matching_entries(
  family: Family, model: ModelConfig, arrays: dict[str, np.ndarray], stored: dict[str, Any]
) -> dict[str, Entry]:
  """Returns the entries of the form the file is in, experts apart or fused."""
  letters = letters_of(model)
  forms = [family.entries(letters, arrays, is_fused) for is_fused in ([False, True] if family.fused else [False])]
  return min(forms, key=lambda entries: len(entries.keys() ^ stored.keys()))
