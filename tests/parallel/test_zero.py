import jax
import numpy as np
import pytest

from tests.parallel.meshes import run, tiny_run_config
from tests.parallel.test_parity import relative_difference
from ultrathink_jax.parallel.devices import Devices
from ultrathink_jax.recipes.pretrain import make_pretrain
from ultrathink_jax.train.plan import make_plan

MODEL = {"layers": "(AF)x2"}


def state_bytes(zero):
  """Returns the bytes of parameters, and of all state, on one of 8 devices."""
  config = tiny_run_config({"fsdp": 8, "zero": zero}, MODEL)
  plan = make_plan(config, make_pretrain(config), Devices("cpu", "cpu", 8, 2**40))
  held = lambda shapes, shardings: sum(
    jax.tree.leaves(
      jax.tree.map(lambda x, s: x.dtype.itemsize * np.prod(s.shard_shape(x.shape), dtype=int), shapes, shardings)
    )
  )
  return held(plan.shapes.params, plan.shardings.params), held(plan.shapes, plan.shardings)


def test_levels_keep_what_they_say_on_a_device():
  whole, _ = state_bytes(1)
  sharded, third = state_bytes(3)
  assert sharded == whole // 8
  guard = 4 * (2 * 128 + 3)  # its window and counts
  assert third == 3 * sharded + 3 * 4 + guard  # two moments; the step and two counts of the optimizer
  for zero in (1, 2):
    assert state_bytes(zero) == (whole, third + whole - sharded)


@pytest.mark.parametrize("accumulation", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_levels_train_alike_and_take_less_memory(accumulation):
  train = {"accumulation_steps": accumulation, "batch_size": 8 * accumulation}
  mesh = {"fsdp": 2}
  runs = [run(mesh | {"zero": zero}, MODEL, steps=3, train=train) for zero in (1, 2, 3)]
  for other in runs[1:]:
    np.testing.assert_allclose(other.losses, runs[0].losses, rtol=1e-6)
    assert relative_difference(other.gradients, runs[0].gradients) < 1e-5
  temporary = [r.step.memory_analysis().temp_size_in_bytes for r in runs]
  if accumulation == 1:  # sums over micro-batches XLA shards by itself, for the sake of the moments
    assert temporary[1] < temporary[0]
  assert runs[2].state_bytes < runs[1].state_bytes == runs[0].state_bytes
