"""How large a model is and what a token costs, from shapes alone.

Letters: D embed  N heads  H head dim  T sequence length; Mamba: P head dim, Q chunk, Z state size.
"""

import dataclasses
import math
from typing import Any

import jax

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.models.language_model import init_cache, parameter_shapes
from ultrathink_jax.models.layer import groups, layer_names

EXPERT_BANKS = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LayerCount:
  """One line of the layer table: `count` layers of the same letter and size."""

  letter: str
  name: str
  count: int
  parameters: int  # of one layer
  active_parameters: int  # of one layer, for one token


@dataclasses.dataclass(frozen=True)
class ModelCount:
  """Sizes of a model; bytes are float32 for parameters and the compute dtype for caches."""

  layers: tuple[LayerCount, ...]
  embedding: int
  unembedding: int  # 0 where tied
  final_norm: int
  cache_bytes_per_token: int  # of one sequence, beside its fixed part
  cache_bytes_fixed: int  # of one sequence, whatever its length

  @property
  def total(self) -> int:
    return sum(line.count * line.parameters for line in self.layers) + self._outside

  @property
  def active(self) -> int:
    return sum(line.count * line.active_parameters for line in self.layers) + self._outside

  @property
  def _outside(self) -> int:
    return self.embedding + self.unembedding + self.final_norm


def count_model(model: ModelConfig) -> ModelCount:
  """Returns the counts; traces the model's initialisation and allocates nothing."""
  params = parameter_shapes(model)
  lines: dict[str, LayerCount] = {}
  for index, group in enumerate(groups(model)):
    stacked = params[f"group_{index}"]
    for name, letter in zip(layer_names(group.letters), group.letters, strict=True):
      parameters = _size(stacked[name]) // group.repeats
      inactive = 0
      if letter == "E":
        mixer = stacked[name]["mixer"]
        banks = sum(_size(mixer[bank]) for bank in EXPERT_BANKS if bank in mixer) // group.repeats
        inactive = banks * (model.num_experts - model.experts_per_token) // model.num_experts
      seen = lines.get(letter)
      count = group.repeats + (seen.count if seen else 0)
      lines[letter] = LayerCount(letter, name.rsplit("_", 1)[0], count, parameters, parameters - inactive)
  short, long = (_cache_bytes(model, length) for length in (1, 2))
  return ModelCount(
    tuple(lines.values()),
    _size(params["embedding"]),
    _size(params.get("unembedding", {})),
    _size(params["final_norm"]),
    long - short,
    short - (long - short),
  )


def train_flops_per_token(
  model: ModelConfig, count: ModelCount, sequence_length: int, trained_share: float = 1.0
) -> float:
  """Returns forward and backward FLOPs of one token, without recomputation.

  6 x active parameters (the output projection counted, the embedding table not), of which a third is spent on
    gradients of weights, of the `trained_share` of them alone
  + 12 N H x mean visible keys per attention layer (T / 2 for causal attention)
  + 6 x (Q/2 (Z + P) + 2 Z P) x heads per Mamba layer.
  """
  T, W = sequence_length, min(sequence_length, model.window_tokens)
  matrices = count.active - (0 if model.tie_embeddings else count.embedding)
  attended = {"A": T / 2, "L": W - W * W / (2 * T)}
  Q, Z, P = model.mamba_chunk_tokens, model.mamba_state_dim, model.mamba_head_dim
  flops = (4.0 + 2.0 * trained_share) * matrices
  for line in count.layers:
    flops += 12 * line.count * model.num_heads * model.head_dim * attended.get(line.letter, 0)
    if line.letter == "M":
      flops += 6 * line.count * model.mamba_heads * (Q / 2 * (Z + P) + 2 * Z * P)
  return flops


def _size(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _cache_bytes(model: ModelConfig, length: int) -> int:
  cache = jax.eval_shape(lambda: init_cache(model, 1, length))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
