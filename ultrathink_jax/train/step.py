"""The train step: gradients summed over micro-batches, divided once, clipped, applied where they count."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ultrathink_jax.config import Config
from ultrathink_jax.kernels.sum_of_squares import sum_of_squares
from ultrathink_jax.models.components import component
from ultrathink_jax.optimizers.groups import is_router_bias
from ultrathink_jax.optimizers.optimizers import needs_curvature
from ultrathink_jax.optimizers.sophia import curvature_of
from ultrathink_jax.parallel.sharding import constrain_tree
from ultrathink_jax.train import guard
from ultrathink_jax.types import Batch, LossInfo, Parameters, Recipe, TrainState

_CURVATURE = 2**31 - 1  # apart from the keys of micro-batches


def make_train_step(
  config: Config,
  recipe: Recipe,
  optimizer: optax.GradientTransformation,
  on_device: Callable[[Any], Any] = lambda opt_state: opt_state,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]:
  """Returns (state, frozen, batch) -> (next state, metrics).

  The gradient is that of (sum of losses) / (sum of weights) over the whole batch, however it is split. A step that the
  guard refuses leaves parameters and optimizer as they were; it is a step all the same. `on_device` brings an
  optimizer state that rests elsewhere to where it is computed with.

  Metrics: the sums of the recipe's loss, `weight`, `grad_norm` and its parts `grad_norm/COMPONENT`, `skipped` and
  `skipped_in_a_row` up to this step.
  """
  accumulation_steps, zero = config.train.accumulation_steps, config.mesh.zero
  optimizer = optax.with_extra_args_support(optimizer)

  def summed(
    loss: Callable[..., tuple[jax.Array, LossInfo]], state: TrainState, frozen: Any, batch: Batch, key: jax.Array
  ) -> tuple[Any, LossInfo]:
    def gradients_and_info(*args: Any) -> tuple[Any, LossInfo]:
      gradients, info = jax.grad(loss, has_aux=True)(*args)
      return constrain_tree(gradients, recipe.axes, is_over_fsdp=zero > 1), info

    if accumulation_steps == 1:
      return gradients_and_info(state.params, frozen, batch, state.step, key)
    return _accumulate(gradients_and_info, state, frozen, batch, key, accumulation_steps)

  def curvature(state: TrainState, frozen: Any, batch: Batch, key: jax.Array) -> Any:
    gradients, info = summed(recipe.sampled_loss, state, frozen, batch, jax.random.fold_in(key, _CURVATURE))
    return curvature_of(gradients, info.weight)

  def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    gradients, info = summed(recipe.loss, state, frozen, batch, key)
    weight = jnp.maximum(info.weight, 1e-8)
    gradients = jax.tree.map(lambda g: g / weight, gradients)
    norms = _norms(gradients)
    counts, judged = guard.judge(
      config.optimizer.guard, state.guard, info.metrics["loss/total"] / weight, norms["grad_norm"]
    )
    extra = {"step": state.step, "norm": norms["grad_norm"]}
    if recipe.sampled_loss is not None and needs_curvature(config.optimizer):
      extra["curvature"] = partial(curvature, state, frozen, batch, key)

    def apply(params: Parameters, opt_state: Any) -> tuple[Parameters, Any]:
      updates, opt_state = optimizer.update(gradients, opt_state, params, **extra)
      return optax.apply_updates(params, updates), opt_state

    # A choice between new and old, leaf by leaf, would keep more of both than the compiler can do in place.
    params, opt_state = jax.lax.cond(counts, apply, lambda *old: old, state.params, on_device(state.opt_state))
    metrics = info.metrics | norms | {"weight": info.weight}
    metrics |= {"skipped": judged.skipped, "skipped_in_a_row": judged.skipped_in_a_row}
    return TrainState(state.step + 1, params, opt_state, judged), metrics

  return train_step


def _norms(gradients: Any) -> dict[str, jax.Array]:
  """Returns the global norm of the gradients, as the optimizer clips by, and that of each component of the model."""
  squares: dict[str, list[jax.Array]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    if not is_router_bias(path):
      squares.setdefault(component(path), []).append(sum_of_squares(leaf))
  norms = {f"grad_norm/{name}": jnp.sqrt(sum(parts)) for name, parts in squares.items()}
  return {"grad_norm": jnp.sqrt(sum(itertools.chain.from_iterable(squares.values())))} | norms


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
