"""Pretraining: next-token prediction on packed documents. Letters: R expert layers  E experts."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ultrathink_jax.config import Config
from ultrathink_jax.data.loader import training_loader
from ultrathink_jax.data.prepare import PreparedData
from ultrathink_jax.errors import DataError
from ultrathink_jax.layers.linear import ADAPTERS
from ultrathink_jax.layers.router import noise_deviation
from ultrathink_jax.losses.language_modeling import language_modeling_loss, loss_weights, sampled_loss
from ultrathink_jax.models.language_model import LanguageModel, init_params, parameter_axes, variables
from ultrathink_jax.models.layer import layer_paths
from ultrathink_jax.types import Batch, LossInfo, Parameters, Recipe, TrainState


def make_pretrain(config: Config) -> Recipe:
  """Returns the recipe; it freezes nothing by itself."""
  model = LanguageModel(config.model)

  def loss(
    params: Parameters, frozen: None, batch: Batch, step: Int[Array, ""], key: Key[Array, ""]
  ) -> tuple[Float[Array, ""], LossInfo]:
    context, first = batch.context, config.model.router_noise
    rngs = {ADAPTERS: jax.random.fold_in(key, 1)} if config.lora.dropout else {}
    if first:
      context = context._replace(router_noise=noise_deviation(first, config.model.router_noise_steps, step))
      rngs["router"] = key
    output = model.apply(variables(params), batch.tokens, context, rngs=rngs)
    return language_modeling_loss(output, batch, config.loss)

  return Recipe(
    init=lambda key, base=None: (init_params(config.model, key) if base is None else base, None),
    axes=parameter_axes(config.model),
    loss=loss,
    source=partial(_Source, config),
    summarize=lambda sums: summarize(config, sums),
    sampled_loss=_make_sampled_loss(config),
  )


def _make_sampled_loss(config: Config) -> Callable[..., tuple[Float[Array, ""], LossInfo]]:
  """Returns (params, frozen, batch, step, key) -> what `sampled_loss` does, of the model without its routers' noise."""
  model = LanguageModel(config.model)

  def loss(
    params: Parameters, frozen: None, batch: Batch, step: Int[Array, ""], key: Key[Array, ""]
  ) -> tuple[Float[Array, ""], LossInfo]:
    return sampled_loss(model.apply(variables(params), batch.tokens, batch.context), batch, key)

  return loss


class _Source:
  """Batches of packed documents, read ahead as long as steps follow one another."""

  def __init__(self, config: Config, data: PreparedData, rows: Sequence[int]):
    for info in data.infos:
      if info.num_sequences > 1:
        raise DataError(f"data.source={info.source!r} holds preferences, of which recipe=pretrain can read no text")
    self._loader = training_loader(config, data, rows)
    self._batches: Iterator[Batch] | None = None
    self._next_step = -1

  def __call__(self, step: int, state: TrainState) -> Batch:
    if step != self._next_step:
      self._batches = self._loader.batches(step)
    self._next_step = step + 1
    return next(self._batches)

  def samples(self, step: int) -> str:
    return "; ".join(
      f"{name}: documents {', '.join(map(str, numbers))}" for name, numbers in self._loader.documents(step).items()
    )


def summarize(config: Config, sums: dict[str, Any]) -> dict[str, Any]:
  """Returns the reported numbers of a step, in nats per token: `loss` is the language-modelling loss.

  Where the loss has other parts, they follow as `loss/NAME`, each as `loss/NAME_weighted` too, which sum to
  `loss/total`. Expert runs add what `_summarize_experts` returns.
  """
  weight = max(float(sums["weight"]), 1e-8)
  values: dict[str, Any] = {"loss": float(sums["loss/lm"]) / weight}
  parts = [name for name in sums if name.startswith("loss/") and name != "loss/lm"]
  if len(parts) > 1:
    values |= {name: float(sums[name]) / weight for name in parts}
    for name, share in loss_weights(config.loss).items():
      if f"loss/{name}" in sums:
        values[f"loss/{name}_weighted"] = share * float(sums[f"loss/{name}"]) / weight
  loads = {}
  for number, path, repeat in layer_paths(config.model):
    counts = sums.get(f"moe/load/{path}")
    if counts is not None:
      loads[f"layers.{number}"] = np.asarray(counts[repeat], np.float64)
  if loads:
    values |= _summarize_experts(loads, float(sums["moe/dropped"]), config.model.expert_group_sizes)
  return values


def _summarize_experts(
  loads: dict[str, Float[np.ndarray, " E"]], dropped: float, group_sizes: dict[str, int]
) -> dict[str, Any]:
  """Returns, over all expert layers and from counts of choices:

  `moe/entropy`: mean entropy of the load over ln E; 1 is even.
  `moe/max_expert`: largest share of a layer's choices.
  `moe/dropped`: share of choices dropped.
  `moe/dead`: number of experts with less than a tenth of an even share.
  `moe/GROUP/share`: mean share of a group's experts.
  `moe/GROUP/entropy`: as moe/entropy, of the choices of the group's experts; a group of one has none, and neither has a
    group that no layer chose.
  `moe/load`: {layer: [share of each expert]}.
  """
  shares = {name: counts / max(counts.sum(), 1) for name, counts in loads.items()}
  table = np.stack(list(shares.values()))
  values: dict[str, Any] = {
    "moe/entropy": _mean_entropy(table),
    "moe/max_expert": float(table.max()),
    "moe/dropped": dropped / max(sum(counts.sum() for counts in loads.values()), 1),
    "moe/dead": int(np.sum(table < 0.1 / table.shape[1])),
  }
  first = 0
  for name, size in group_sizes.items():
    group = table[:, first : first + size]
    first += size
    values[f"moe/{name}/share"] = float(group.sum(axis=1).mean())
    chosen = group[group.sum(axis=1) > 0]
    if size > 1 and len(chosen):
      values[f"moe/{name}/entropy"] = _mean_entropy(chosen / chosen.sum(axis=1, keepdims=True))
  return values | {"moe/load": {name: [round(float(v), 6) for v in s] for name, s in shares.items()}}


def _mean_entropy(shares: Float[np.ndarray, "R E"]) -> float:
  """Returns the mean over rows of their entropy / ln E; 1 is even."""
  entropies = -np.sum(shares * np.log(np.maximum(shares, 1e-12)), axis=1)
  return float(entropies.mean() / np.log(max(2, shares.shape[1])))
