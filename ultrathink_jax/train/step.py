"""The train step: gradients summed over micro-batches, divided once, clipped, applied."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ultrathink_jax.parallel.sharding import constrain_tree
from ultrathink_jax.types import Batch, LossInfo, Recipe, TrainState


def make_train_step(
  recipe: Recipe,
  optimizer: optax.GradientTransformation,
  accumulation_steps: int,
  seed: int,
  zero: int = 3,
  on_device: Callable[[Any], Any] = lambda opt_state: opt_state,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """Returns (state, frozen, batch) -> (next state, metrics): the sums of the recipe's loss, `weight`, `grad_norm`.

  The gradient is that of (sum of losses) / (sum of weights) over the whole batch, however it is split. `zero` is
  mesh.zero; `on_device` brings an optimizer state that rests elsewhere to where it is computed with.
  """

  def gradients_and_info(*args: Any) -> tuple[Any, LossInfo]:
    gradients, info = jax.grad(recipe.loss, has_aux=True)(*args)
    return constrain_tree(gradients, recipe.axes, is_over_fsdp=zero > 1), info

  def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    if accumulation_steps == 1:
      gradients, info = gradients_and_info(state.params, frozen, batch, state.step, key)
    else:
      gradients, info = _accumulate(gradients_and_info, state, frozen, batch, key, accumulation_steps)
    gradients = jax.tree.map(lambda g: g / jnp.maximum(info.weight, 1e-8), gradients)
    updates, opt_state = optimizer.update(gradients, on_device(state.opt_state), state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = info.metrics | {"weight": info.weight, "grad_norm": optax.tree.norm(gradients)}
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step


def _accumulate(
  grad_of_sum: Callable[..., tuple[Any, LossInfo]],
  state: TrainState,
  frozen: Any,
  batch: Batch,
  key: jax.Array,
  accumulation_steps: int,
) -> tuple[Any, LossInfo]:
  """Returns gradients and infos summed over micro-batches; rows are dealt out so that each device keeps its share."""
  deal = lambda x: jnp.moveaxis(x.reshape(x.shape[0] // accumulation_steps, accumulation_steps, *x.shape[1:]), 1, 0)
  micro_batches = jax.tree.map(deal, batch)
  add = lambda total, new: jax.tree.map(jnp.add, total, new)

  def one(total, inputs):
    index, micro_batch = inputs
    new = grad_of_sum(state.params, frozen, micro_batch, state.step, jax.random.fold_in(key, index))
    return add(total, new), None

  first = jax.tree.map(lambda x: x[0], micro_batches)
  shapes = jax.eval_shape(grad_of_sum, state.params, frozen, first, state.step, key)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(one, zeros, (jnp.arange(accumulation_steps), micro_batches))[0]
