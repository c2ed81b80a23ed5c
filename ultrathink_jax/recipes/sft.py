"""Instruction tuning: what a prompt or a user says is read, and what follows it is learned."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jaxtyping import Array, Float, Int, Key

from ultrathink_jax.config import Config
from ultrathink_jax.data.prepare import PreparedData
from ultrathink_jax.errors import DataError
from ultrathink_jax.recipes.pretrain import make_pretrain
from ultrathink_jax.types import Batch, LossInfo, Parameters, Recipe

_LOOKED_AT = 100  # documents of a source, to see whether they have prompts


def make_sft(config: Config) -> Recipe:
  """Returns the recipe: pretraining's loss over completions, and over prompts by loss.prompt_weight."""
  recipe = make_pretrain(config)
  if config.loss.prompt_weight:
    recipe = recipe._replace(loss=_with_prompts(recipe.loss, config.loss.prompt_weight))
  return recipe._replace(source=partial(_source, recipe.source))


def _with_prompts(loss: Callable[..., Any], weight: float) -> Callable[..., Any]:
  """Returns a loss in which tokens of prompts count too: those of a document whose weight is 0."""

  def of_all(
    params: Parameters, frozen: Any, batch: Batch, step: Int[Array, ""], key: Key[Array, ""]
  ) -> tuple[Float[Array, ""], LossInfo]:
    is_prompt = (batch.weights == 0) & (batch.context.segment_ids != 0)
    weights = batch.weights + weight * is_prompt
    return loss(params, frozen, batch._replace(weights=weights), step, key)

  return of_all


def _source(make_source: Callable[..., Any], data: PreparedData, rows: Sequence[int]) -> Any:
  """Returns the source of batches. Raises DataError where a source has entries without prompts alone."""
  for info, store in zip(data.infos, data.train, strict=True):
    examples = (store.example(number) for number in range(min(len(store), _LOOKED_AT)))
    if len(store) and all(example.is_learned.all() for example in examples):
      raise DataError(
        f"recipe=sft with data.source={info.source!r}, whose entries have no prompts: give entries of prompt and "
        "completion or of messages, or choose recipe=pretrain"
      )
  return make_source(data, rows)
