"""Runs of a tiny model on a mesh of virtual devices, for tests that compare meshes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tests.conftest import packed_context, tiny_config, tiny_model
from ultrathink_jax.parallel.devices import Devices
from ultrathink_jax.parallel.mesh import BATCH_AXES
from ultrathink_jax.recipes import find_recipe
from ultrathink_jax.train.plan import make_plan, step_function
from ultrathink_jax.train.state import make_init
from ultrathink_jax.types import Batch

ROWS, LENGTH = 8, 32


class Run(NamedTuple):
  """What a run came to; `gradients` are the first ones, `state_bytes` what device 0 holds of the state."""

  losses: np.ndarray
  norms: np.ndarray
  gradients: Any
  state_bytes: int
  step: Any


def tiny_run_config(mesh: dict[str, int], model: dict[str, Any], **sections: dict[str, Any]):
  """Returns the configuration of a run on 8 rows of 32 tokens."""
  sections["train"] = {"batch_size": ROWS, "sequence_length": LENGTH} | sections.get("train", {})
  sections["optimizer"] = {"warmup_steps": 0} | sections.get("optimizer", {})
  config = tiny_config(mesh={"data": 1} | mesh, **sections)
  model = {"unroll": 1, "experts_backend": "sorted", "expert_buffer_factor": 8.0} | model
  return dataclasses.replace(config, model=tiny_model(**model))


def run(mesh: dict[str, int], model: dict[str, Any], steps: int, **sections: dict[str, Any]) -> Run:
  """Returns what `steps` steps on one packed batch come to on a mesh of as many devices as it names."""
  config = tiny_run_config(mesh, model, **sections)
  recipe = find_recipe(config)
  devices = jax.devices()[: int(np.prod(list(config.mesh.axes.values()))) * config.mesh.slices]
  plan = make_plan(config, recipe, Devices("cpu", "cpu", len(devices), 2**40), devices)
  rows = config.train.batch_size
  tokens = jax.random.randint(jax.random.key(1), (rows, LENGTH), 0, config.model.vocab_size)
  context = packed_context(19, 10, -3, batch=rows)
  weights = (context.segment_ids != 0).astype(jnp.float32)
  batch = Batch(tokens, jnp.roll(tokens, -1, 1), weights, context)
  with jax.set_mesh(plan.mesh):
    batch = jax.device_put(batch, NamedSharding(plan.mesh, PartitionSpec(BATCH_AXES, "context")))
    layout = (plan.shardings, plan.frozen_shardings)
    state, frozen = jax.jit(make_init(config, recipe, plan.optimizer), out_shardings=layout)()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    train_step = step_function(config, recipe, plan)

    def step_and_gradients(state, frozen, batch):  # one program: the gradients are the same computation, done once
      key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
      gradients = jax.grad(recipe.loss, has_aux=True)(state.params, frozen, batch, state.step, key)[0]
      return *train_step(state, frozen, batch), gradients

    layout = (plan.shardings, None, plan.shardings.params)
    step = jax.jit(step_and_gradients, out_shardings=layout).lower(state, frozen, batch).compile()
    losses, norms, first = [], [], None
    for _ in range(steps):
      state, metrics, gradients = step(state, frozen, batch)
      losses.append(float(metrics["loss/total"] / metrics["weight"]))
      norms.append(float(metrics["grad_norm"]))
      first = jax.device_get(gradients) if first is None else first
  return Run(np.array(losses), np.array(norms), first, held, step)
