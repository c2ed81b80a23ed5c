import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import packed_context, tiny_config
from ultrathink_jax.config import MeshConfig
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.parallel.devices import Devices
from ultrathink_jax.parallel.mesh import make_mesh
from ultrathink_jax.recipes.pretrain import make_pretrain
from ultrathink_jax.train import loop
from ultrathink_jax.train.state import make_init
from ultrathink_jax.train.step import make_train_step
from ultrathink_jax.types import Batch

ONE = MeshConfig(1, 1, 1, 1, 1, 1)


@pytest.mark.parametrize(
  ("changes", "batch", "message"),
  [
    ({"data": 3}, 9, "needs 3 devices and there are 8"),
    ({"data": -1, "tensor": 3}, 8, "needs 6 devices"),
    ({"data": 8}, 6, "6 sequences .* do not divide over 8 devices"),
    ({"data": 4, "pipe": 2}, 8, "mesh.pipe=2: only data, fsdp, tensor"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(changes, batch, message):
  with pytest.raises(ConfigError, match=message):
    make_mesh(dataclasses.replace(ONE, **changes), batch)


def test_minus_one_takes_the_devices_that_are_left():
  assert dict(make_mesh(dataclasses.replace(ONE, data=-1, fsdp=2), 8).shape)["data"] == 4


def run_steps(mesh):
  """Returns the losses and first gradient norm of three float32 steps, and how many bytes device 0 holds."""
  config = tiny_config(mesh=mesh, train={"batch_size": 8, "sequence_length": 16}, optimizer={"warmup_steps": 0})
  recipe = make_pretrain(config)
  plan = loop.make_plan(config, recipe, Devices("cpu", "cpu", 8, 2**40))
  tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
  batch = Batch(tokens, jnp.roll(tokens, -1, 1), jnp.ones((8, 16)), packed_context(9, 7, batch=8))
  with jax.set_mesh(plan.mesh):
    init = make_init(recipe, plan.optimizer, 0)
    state, _ = jax.jit(init, out_shardings=(plan.shardings, None))()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    step = jax.jit(make_train_step(recipe, plan.optimizer, 1, 0), out_shardings=(plan.shardings, None))
    results = []
    for _ in range(3):
      state, metrics = step(state, None, batch)
      results.append((float(metrics["loss/total"] / metrics["weight"]), float(metrics["grad_norm"])))
  return np.array(results), held


def test_every_mesh_trains_like_data_parallelism_and_shards_its_state():
  reference, replicated = run_steps({"data": 8})
  for mesh, share in (({"data": 1, "fsdp": 8}, 0.2), ({"data": 2, "fsdp": 2, "tensor": 2}, 0.4)):
    results, held = run_steps(mesh)
    np.testing.assert_allclose(results, reference, rtol=1e-4)
    assert held < share * replicated
