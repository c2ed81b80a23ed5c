"""The average of a run's parameters, which evaluation and export read."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

from ultrathink_jax.optimizers.groups import is_router_bias
from ultrathink_jax.types import Parameters


class AverageState(NamedTuple):
  """Updates so far, the average of the parameters, and the state of the optimizer that moves them."""

  count: Array
  average: Parameters
  inner: Any


def with_average(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformationExtraArgs:
  """Returns `optimizer` with an exponential moving average of the parameters in its state.

  After update t, counted from 0, the average keeps min(decay, (1 + t) / (10 + t)) of itself: the parameters that a run
  began with soon stop to count.
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def init(params: Parameters) -> AverageState:
    return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), optimizer.init(params))

  def update(gradients: Any, state: AverageState, params: Parameters, **extra: Any) -> tuple[Any, AverageState]:
    updates, inner = optimizer.update(gradients, state.inner, params, **extra)
    kept = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
    blend = lambda average, now: (kept * average + (1 - kept) * now).astype(average.dtype)
    average = jax.tree.map(blend, state.average, optax.apply_updates(params, updates))
    return updates, AverageState(optax.safe_increment(state.count), average, inner)

  return optax.GradientTransformationExtraArgs(init, update)


def averaged(opt_state: Any, params: Parameters) -> Parameters | None:
  """Returns the averaged parameters of a run, or None where its optimizer keeps no average.

  They are those of optimizer.average_decay, or what schedule-free optimization evaluates with. In the latter, biases of
  routers, which it does not move, are those of `params`.
  """
  is_average = lambda state: isinstance(state, AverageState | ScheduleFreeState)
  for state in jax.tree.leaves(opt_state, is_leaf=is_average):
    if isinstance(state, AverageState):
      return state.average
    if isinstance(state, ScheduleFreeState):
      found = schedule_free_eval_params(state, params)
      return jax.tree_util.tree_map_with_path(lambda path, p, x: p if is_router_bias(path) else x, params, found)
  return None
