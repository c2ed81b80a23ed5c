"""Pretraining: next-token prediction on packed documents."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Key

from ultrathink_jax.config import Config
from ultrathink_jax.data import PreparedData
from ultrathink_jax.data.loader import Loader
from ultrathink_jax.losses.language_modeling import language_modeling_loss
from ultrathink_jax.models.language_model import LanguageModel, init_params, parameter_axes
from ultrathink_jax.models.layer import layer_paths
from ultrathink_jax.types import Batch, LossInfo, Parameters, Recipe, TrainState


def make_pretrain(config: Config) -> Recipe:
  """Returns the recipe; it freezes nothing."""
  model = LanguageModel(config.model)

  def loss(params: Parameters, frozen: None, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], LossInfo]:
    output = model.apply({"params": params}, batch.tokens, batch.context)
    return language_modeling_loss(output, batch, config.loss)

  return Recipe(
    init=lambda key: (init_params(config.model, key), None),
    axes=parameter_axes(config.model),
    loss=loss,
    source=lambda data: _make_source(config, data),
    summarize=lambda sums: summarize(config, sums),
  )


def _make_source(config: Config, data: PreparedData) -> Callable[[int, TrainState], Batch]:
  """Returns a source that reads ahead as long as steps follow one another."""
  loader = Loader(data.train, data.tokenizer, config.train.batch_size, config.train.sequence_length, config.train.seed)
  batches: Iterator[Batch] | None = None
  next_step = -1

  def source(step: int, state: TrainState) -> Batch:
    nonlocal batches, next_step
    if step != next_step:
      batches = loader.batches(step)
    next_step = step + 1
    return next(batches)

  return source


def summarize(config: Config, sums: dict[str, Any]) -> dict[str, Any]:
  """Returns the reported numbers of a step: `loss` is the language-modelling loss in nats per token.

  Expert runs add, over all expert layers, `moe/entropy` (mean entropy of the load over ln E: 1 is even),
  `moe/max_expert` (largest share of a layer's choices), `moe/dropped` (share of choices dropped) and `moe/load`
  ({layer: [share of each expert]}).
  """
  weight = max(float(sums["weight"]), 1e-8)
  values: dict[str, Any] = {"loss": float(sums["loss/lm"]) / weight}
  parts = [name for name in sums if name.startswith("loss/") and name != "loss/lm"]
  if len(parts) > 1:
    values |= {name: float(sums[name]) / weight for name in parts}
  layers = {}
  for number, path, repeat in layer_paths(config.model):
    counts = sums.get(f"moe/load/{path}")
    if counts is not None:
      layers[f"layers.{number}"] = np.asarray(counts[repeat], np.float64)
  if layers:
    total = sum(counts.sum() for counts in layers.values())
    shares = {name: counts / max(counts.sum(), 1) for name, counts in layers.items()}
    entropies = [-np.sum(s * np.log(np.maximum(s, 1e-12))) / np.log(max(2, s.size)) for s in shares.values()]
    values |= {
      "moe/entropy": float(np.mean(entropies)),
      "moe/max_expert": float(max(s.max() for s in shares.values())),
      "moe/dropped": float(sums["moe/dropped"]) / max(total, 1),
      "moe/load": {name: [round(float(v), 6) for v in s] for name, s in shares.items()},
    }
  return values
