"""Any recipe as one that trains adapters, or a part of the parameters, over a frozen base."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int, Key

from ultrathink_jax.config import Config, LoraConfig, OptimizerConfig
from ultrathink_jax.lora.adapters import adapter_axes, attach, init_adapters
from ultrathink_jax.lora.freezing import Trained, find_trained, freeze, frozen_axes, place, take, trained_axes
from ultrathink_jax.lora.targets import Target, find_targets
from ultrathink_jax.models.language_model import parameter_axes
from ultrathink_jax.types import Adapted, Batch, LossInfo, Parameters, Recipe

_ADAPTER_STREAM = 2**31 - 3  # of the key that adapters are drawn from, apart from those of parameters


class Frozen(NamedTuple):
  """What an adapted run reads and never changes.

  Attributes:
    params: float weights of the base.
    quantized: those kept in few bits.
    start: PiSSA's adapters at the start.
    inner: what the recipe itself freezes.
  """

  params: Parameters
  quantized: Parameters
  start: Parameters
  inner: Any


class Adaptation(NamedTuple):
  """What of a model is trained. Trees of it have the parts `lora`, of adapters, and `trained`, of parameters."""

  targets: Sequence[Target]
  trained: Sequence[Trained]
  lora: LoraConfig

  def split(self, base: Parameters, key: Key[Array, ""], inner: Any = None) -> tuple[Parameters, Frozen]:
    """Returns what is trained at first, and what is frozen."""
    adapters, start = init_adapters(self.targets, self.lora, key, base)
    parts = {"lora": adapters, "trained": take(self.trained, base)}
    return without_empty(parts), Frozen(*freeze(self.trained, base, self.lora.base_dtype), start, inner)

  def join(self, params: Parameters, frozen: Frozen, is_training: bool) -> Adapted:
    """Returns what the model reads."""
    weights = place(self.trained, frozen.params, params.get("trained", {}))
    lora = attach(self.targets, self.lora, params.get("lora", {}), frozen.start, is_training)
    return Adapted(weights, frozen.quantized, lora)


def adaptation_of(config: Config) -> Adaptation:
  """Returns what the run trains. Raises ConfigError where a pattern matches nothing."""
  return Adaptation(find_targets(config), find_trained(config.model, config.train.trainable), config.lora)


def adapted(config: Config, recipe: Recipe) -> Recipe:
  """Returns `recipe` with adapters, or parts of the parameters, as what is trained.

  Its loss reads the base with the adapters in it; the base has no gradient, and no state of the optimizer.
  """
  adaptation = adaptation_of(config)

  def init(key: Key[Array, ""], base: Parameters | None = None) -> tuple[Parameters, Frozen]:
    whole, inner = recipe.init(key, base)
    return adaptation.split(whole, jax.random.fold_in(key, _ADAPTER_STREAM), inner)

  def through(loss: Any) -> Any:
    if loss is None:
      return None

    def of_adapted(
      params: Parameters, frozen: Frozen, batch: Batch, step: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], LossInfo]:
      return loss(adaptation.join(params, frozen, is_training=True), frozen.inner, batch, step, key)

    return of_adapted

  axes, start_axes = adapter_axes(adaptation.targets, config.lora)
  parts = {"lora": axes, "trained": trained_axes(config.model, adaptation.trained)}
  base_axes = frozen_axes(config.model, adaptation.trained, config.lora.base_dtype)
  return recipe._replace(
    init=init,
    axes=without_empty(parts),
    loss=through(recipe.loss),
    sampled_loss=through(recipe.sampled_loss),
    frozen_axes=Frozen(*base_axes, start_axes, recipe.frozen_axes),
    base_axes=parameter_axes(config.model),
    weights=lambda params, frozen: adaptation.join(params, frozen, is_training=False),
  )


def optimizer_of(config: Config) -> OptimizerConfig:
  """Returns the optimizer's section with the rate of B that LoRA+ gives it (arXiv:2402.12354)."""
  if config.lora.rate_ratio == 1 or not config.lora.rank:
    return config.optimizer
  faster = f"lora/*/lora_b={config.lora.rate_ratio}"
  return dataclasses.replace(config.optimizer, rate_multipliers=(*config.optimizer.rate_multipliers, faster))


def without_empty(parts: dict[str, Any]) -> dict[str, Any]:
  """Returns the parts of what is trained that there are."""
  return {name: tree for name, tree in parts.items() if tree}
