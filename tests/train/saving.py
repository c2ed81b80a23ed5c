"""A tiny state to save, and what tests of checkpoints share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.conftest import tiny_config
from ultrathink_jax.types import GuardState, TrainState


def settings(**changes):
  """Returns the section checkpoint of a run that saves every step."""
  return dataclasses.replace(tiny_config().checkpoint, **{"every_steps": 1, "keep_last": 3} | changes)


def state_at(step, size=40):
  """Returns the state of a run after `step` steps: a few types, each number another one."""
  key = jax.random.fold_in(jax.random.key(7), step)
  params = {
    "embedding": jax.random.normal(key, (size, 3)),
    "layers": {"scale": jnp.full((4,), step, jnp.bfloat16), "bias": jnp.zeros(()) + step},
  }
  moments = (jax.tree.map(lambda x: x * 2, params), {"count": jnp.int32(step)}, ())
  guard = GuardState(jnp.full((2, 4), step, jnp.float32), *(jnp.int32(step + i) for i in range(3)))
  return TrainState(jnp.int32(step), params, moments, guard)


def like(state):
  """Returns the shapes of a state on one device."""
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def assert_same_bits(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def contents(directory):
  """Returns {path: bytes} of all files below a directory, and None for directories."""
  return {
    str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
  }


def save(checkpoints, *steps, **values):
  """Saves steps and waits for each; `values` are those of `save`."""
  for step in steps:
    checkpoints.save(state_at(step), step, {"seed": 0, "step": step}, **values)
    checkpoints.wait()
