"""What a session begins with, where it does not go on from a checkpoint: parameters, and what is frozen beside them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ultrathink_jax.config import Config
from ultrathink_jax.logs import log
from ultrathink_jax.parallel.sharding import tree_shardings
from ultrathink_jax.train.initializing import initialize_from
from ultrathink_jax.train.plan import Plan
from ultrathink_jax.train.state import begin, make_init
from ultrathink_jax.types import Parameters, Recipe, TrainState

# Layout of the parameters of a whole model -> those that checkpoint.init_from names, None where it names no whole model
LoadBase = Callable[[Any], Parameters | None]


class Beginning(NamedTuple):
  """The first state of a run, made anew at each call, and what it freezes."""

  first_state: Callable[[], TrainState]
  frozen: Any


def make_beginning(config: Config, recipe: Recipe, plan: Plan, load_base: LoadBase) -> Beginning:
  """Returns how the run begins: with a base that is adapted, with what another run has learned, or with nothing."""
  init = make_init(config, recipe, plan.optimizer)
  if recipe.frozen_axes is None:
    return Beginning(lambda: _first_state(config, plan, init, load_base), None)
  base = load_base(tree_shardings(plan.mesh, recipe.base_axes, is_over_fsdp=config.mesh.zero == 3))
  parts = (plan.shardings.params, plan.frozen_shardings)
  params, frozen = jax.jit(lambda base: _params_and_frozen(init, base), out_shardings=parts, donate_argnums=0)(base)
  restart = jax.jit(lambda: begin(config, jax.tree.map(jnp.copy, params), plan.optimizer), out_shardings=plan.shardings)
  return Beginning(restart, frozen)


def _params_and_frozen(init: Callable[..., tuple[TrainState, Any]], base: Parameters | None) -> tuple[Parameters, Any]:
  state, frozen = init(base)
  return state.params, frozen


def _first_state(
  config: Config, plan: Plan, init: Callable[..., tuple[TrainState, Any]], load_base: LoadBase
) -> TrainState:
  params = load_base(plan.shardings.params)
  if params is None:
    state = jax.jit(lambda: init()[0], out_shardings=plan.shardings)()
    if not config.checkpoint.init_from:
      return state
    params = initialize_from(Path(config.checkpoint.init_from), state.params, log)
  return jax.jit(lambda p: begin(config, p, plan.optimizer), out_shardings=plan.shardings)(params)
