import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parallel.meshes import run, tiny_run_config
from ultrathink_jax.parallel.mesh import make_mesh
from ultrathink_jax.parallel.pipeline import bubble_share, num_ticks, pipeline


def on_stages(stages):
  return make_mesh(tiny_run_config({"pipe": stages}, {"layers": f"(F)x{stages}"}), jax.devices()[:stages])


def affine_stage(params, x, rows, key):
  """Applies x -> x * w + r, period by period; beside x gives which micro-batch it was."""
  del key
  step = lambda x, w: (x * w + rows[:, :, None], rows[0, 0])
  return jax.lax.scan(step, x, params)


def work_items(stages, micro_batches, rounds):
  """Returns for every tick which stages have work, played through by hand."""
  free = [[] for _ in range(stages)]  # micro-batches waiting at each stage
  free[0] = [(0, m) for m in range(micro_batches)]
  busy = []
  while any(free):
    working = [queue.pop(0) if queue else None for queue in free]
    busy.append(sum(item is not None for item in working))
    for stage, item in enumerate(working):
      if item and stage + 1 < stages:
        free[stage + 1].append(item)
      elif item and item[0] + 1 < rounds:
        free[0].append((item[0] + 1, item[1]))
  return busy


@pytest.mark.parametrize(("stages", "micro_batches", "rounds"), [(4, 8, 1), (2, 2, 3), (4, 4, 2), (3, 5, 2), (1, 4, 1)])
def test_ticks_and_bubble_are_those_of_the_schedule_played_by_hand(stages, micro_batches, rounds):
  busy = work_items(stages, micro_batches, rounds)
  assert len(busy) == num_ticks(stages, micro_batches, rounds)
  idle = 1 - sum(busy) / (len(busy) * stages)
  assert idle == pytest.approx(bubble_share(stages, micro_batches, rounds))


@pytest.mark.parametrize(("micro_batches", "num_rounds"), [(4, 1), (2, 1), (4, 2), (8, 3)])
def test_a_pipeline_applies_every_period_in_order_and_gives_its_aux_values(micro_batches, num_rounds):
  x = jax.random.normal(jax.random.key(0), (8, 2, 3))
  rows = jnp.arange(16.0).reshape(8, 2)
  rounds = [jax.random.uniform(jax.random.key(1 + i), (4,)) for i in range(num_rounds)]
  expected = x
  for weight in np.concatenate(rounds):
    expected = expected * weight + rows[:, :, None]
  with jax.set_mesh(on_stages(2)):
    run_it = jax.jit(lambda rounds, x: pipeline(affine_stage, rounds, x, rows, micro_batches, jax.random.key(0)))
    y, aux = run_it(rounds, x)
  np.testing.assert_allclose(y, expected, rtol=1e-5)
  for values in aux:  # rows are dealt out: micro-batch m begins with row m
    np.testing.assert_array_equal(values, np.tile(rows[:micro_batches, 0], (4, 1)))


def test_the_compiled_pipeline_has_the_ticks_of_the_formula():
  x, rows = jnp.ones((8, 2, 3)), jnp.ones((8, 2))
  with jax.set_mesh(on_stages(4)):
    jaxpr = jax.make_jaxpr(lambda w: pipeline(affine_stage, [w], x, rows, 8, jax.random.key(0))[0])(jnp.ones(4))
  lengths = [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
  assert lengths == [num_ticks(4, 8)]


def test_groups_of_equal_letters_run_as_rounds_of_one_pipeline():
  model = {"layers": "(F)x2(F)x2"}
  one, many = run({}, model, steps=2), run({"pipe": 2}, model, steps=2)
  np.testing.assert_allclose(many.losses, one.losses, rtol=1e-5)
  np.testing.assert_allclose(many.norms, one.norms, rtol=1e-5)
