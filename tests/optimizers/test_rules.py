import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from configs import optimizers as published
from tests.conftest import tiny_config
from ultrathink_jax.config import OptimizerConfig, from_mapping
from ultrathink_jax.optimizers.optimizers import OPTIMIZERS, make_optimizer
from ultrathink_jax.optimizers.schedules import make_schedule

RATE, DECAY, NUM_STEPS = 0.1, 0.2, 5


def optimizer_config(**changes):
  defaults = {"schedule": "constant", "clip_norm": 1e9, "weight_decay": DECAY}
  return dataclasses.replace(tiny_config().optimizer, **defaults | changes)


def shapes(stack=()):
  """Returns the shapes of a period's leaves: a projection to heads, one back, a bank of experts, a norm."""
  mixer = {"query": {"kernel": (*stack, 12, 2, 4)}, "out": {"kernel": (*stack, 2, 4, 12)}}
  moe = {"up": {"kernel": (*stack, 3, 12, 5)}}
  return {"attention_0": {"mixer": mixer, "norm": {"scale": (*stack, 12)}}, "moe_1": {"mixer": moe}}


def draw(seed, tree):
  is_shape = lambda leaf: isinstance(leaf, tuple)
  keys = iter(jax.random.split(jax.random.key(seed), 100))
  return jax.tree.map(lambda shape: jax.random.normal(next(keys), shape), tree, is_leaf=is_shape)


PARAMS = {"group_0": draw(0, shapes((2,)))}
GRADIENTS = [{"group_0": draw(1 + step, shapes((2,)))} for step in range(NUM_STEPS)]


def descend(config, params=PARAMS, gradients=GRADIENTS, **extra):
  optimizer = make_optimizer(config, lambda step: RATE)
  state, update = optimizer.init(params), jax.jit(lambda g, s, p: optimizer.update(g, s, p, **extra))
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return params


def pick(tree, *names):
  for name in names:
    tree = tree[name]
  return np.asarray(tree, np.float64)


QUERY = ("group_0", "attention_0", "mixer", "query", "kernel")
OUT = ("group_0", "attention_0", "mixer", "out", "kernel")
UP = ("group_0", "moe_1", "mixer", "up", "kernel")
NORM = ("group_0", "attention_0", "norm", "scale")


def adamw(path, scale=1.0, decay=DECAY, b1=0.9, b2=0.95):
  """Returns a leaf after the steps of AdamW, in float64."""
  x, m, v = pick(PARAMS, *path), 0.0, 0.0
  for t, gradient in enumerate(GRADIENTS, start=1):
    g = pick(gradient, *path)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    x = x - RATE * (scale * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8) + decay * x)
  return x


def test_lion_follows_its_paper():
  after = descend(optimizer_config(name="lion", beta1=0.9, beta2=0.99))
  for path, decay in ((QUERY, DECAY), (NORM, 0.0)):
    x, m = pick(PARAMS, *path), 0.0
    for gradient in GRADIENTS:
      g = pick(gradient, *path)
      x = x - RATE * (np.sign(0.9 * m + 0.1 * g) + decay * x)
      m = 0.99 * m + 0.01 * g
    np.testing.assert_allclose(pick(after, *path), x, rtol=1e-5)


def test_momentum_follows_its_formula():
  after = descend(optimizer_config(name="sgd", beta1=0.9))
  x, m = pick(PARAMS, *QUERY), 0.0
  for gradient in GRADIENTS:
    m = 0.9 * m + pick(gradient, *QUERY)
    x = x - RATE * (m + DECAY * x)
  np.testing.assert_allclose(pick(after, *QUERY), x, rtol=1e-5, atol=1e-6)


def orthogonal(matrix):
  """Returns five steps of the quintic Newton-Schulz iteration."""
  x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
  x = x / np.linalg.norm(x)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x if matrix.shape[0] <= matrix.shape[1] else x.T


@pytest.mark.parametrize(("path", "m", "n"), [(QUERY, 12, 8), (OUT, 8, 12), (UP, 12, 5)])
def test_muon_follows_its_formula_for_every_matrix_of_a_stack(path, m, n):
  after = descend(optimizer_config(name="muon", beta1=0.95, beta2=0.95))
  x = pick(PARAMS, *path).reshape(-1, m, n)
  momentum = np.zeros_like(x)
  for t, gradient in enumerate(GRADIENTS, start=1):
    g = pick(gradient, *path).reshape(-1, m, n)
    momentum = 0.95 * momentum + 0.05 * g
    nesterov = 0.95 * momentum / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
    direction = np.stack([orthogonal(one) for one in nesterov])
    x = x - RATE * (0.2 * np.sqrt(max(m, n)) * direction + DECAY * x)
  np.testing.assert_allclose(pick(after, *path).reshape(-1, m, n), x, rtol=2e-4, atol=1e-4)


def test_muon_moves_everything_else_by_adamw():
  after = descend(optimizer_config(name="muon", beta1=0.95, beta2=0.95))
  np.testing.assert_allclose(pick(after, *NORM), adamw(NORM, decay=0.0, b1=0.95), rtol=1e-5)


def galore(rank, every_steps=200, scale=1.0):
  low = dataclasses.replace(tiny_config().optimizer.galore, rank=rank, every_steps=every_steps, scale=scale)
  return descend(optimizer_config(name="galore", galore=low))


def test_galore_at_full_rank_is_adamw():
  ours, plain = galore(rank=12), descend(optimizer_config(name="adamw"))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_scale_of_galore_is_that_of_matrices_at_any_rank():
  np.testing.assert_allclose(pick(galore(rank=12, scale=0.25), *QUERY), adamw(QUERY, scale=0.25), rtol=1e-4)
  np.testing.assert_allclose(pick(galore(rank=12, scale=0.25), *NORM), adamw(NORM, decay=0.0), rtol=1e-5)


@pytest.mark.parametrize(("path", "m", "n"), [(QUERY, 12, 8), (OUT, 8, 12), (UP, 12, 5)])
def test_galore_follows_its_paper_for_every_matrix_of_a_stack(path, m, n):
  after, rank = galore(rank=3, every_steps=2, scale=0.5), 3
  x = pick(PARAMS, *path).reshape(-1, m, n)
  for one in range(len(x)):
    matrix, projection, first, second = x[one], None, 0.0, 0.0
    for t, gradient in enumerate(GRADIENTS, start=1):
      g = pick(gradient, *path).reshape(-1, m, n)[one]
      g = g if m <= n else g.T  # the projection is of the shorter side
      if t % 2 == 1:
        projection = _aligned(np.linalg.svd(g)[0][:, :rank], _projection_of(path, t, one, m, n, rank))
      low = projection.T @ g
      first, second = 0.9 * first + 0.1 * low, 0.95 * second + 0.05 * low**2
      update = projection @ ((first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.95**t)) + 1e-8))
      matrix = matrix - RATE * (0.5 * (update if m <= n else update.T) + DECAY * matrix)
    np.testing.assert_allclose(pick(after, *path).reshape(-1, m, n)[one], matrix, rtol=1e-3, atol=1e-4)


def _projection_of(path, step, one, m, n, rank):
  """Returns the singular vectors that float32 finds, whose signs are arbitrary."""
  g = pick(GRADIENTS[step - 1], *path).reshape(-1, m, n)[one].astype(np.float32)
  u, _, vh = jnp.linalg.svd(g, full_matrices=False)
  return np.asarray(u[:, :rank] if m <= n else vh[:rank].T)


def _aligned(vectors, like):
  return vectors * np.sign(np.sum(vectors * like, axis=0))


def test_galore_keeps_moments_of_the_low_rank_and_the_longer_side():
  low = dataclasses.replace(tiny_config().optimizer.galore, rank=3)
  state = make_optimizer(optimizer_config(name="galore", galore=low), lambda step: RATE).init(PARAMS)
  galore_state = state[1][0]
  assert pick(galore_state.moments.mu, *QUERY).shape == (2, 12, 1, 3)
  assert pick(galore_state.projections, *QUERY).shape == (2, 3, 2, 4)
  assert pick(galore_state.moments.mu, *OUT).shape == (2, 1, 3, 12)
  assert pick(galore_state.moments.nu, *UP).shape == (2, 3, 12, 3)
  assert pick(galore_state.moments.mu, *NORM).shape == (2, 12)


def test_adafactor_takes_unit_steps_at_first_and_decays_at_the_learning_rate():
  after = descend(optimizer_config(name="adafactor", beta1=0.0), gradients=GRADIENTS[:1])
  g, x = pick(GRADIENTS[0], *QUERY), pick(PARAMS, *QUERY)
  np.testing.assert_allclose(pick(after, *QUERY), x - RATE * (np.sign(g) + DECAY * x), rtol=1e-4)


def test_adafactor_keeps_rows_and_columns_of_large_matrices():
  params = {"group_0": {"mlp_0": {"mixer": {"up": {"kernel": jnp.ones((2, 128, 256))}}}}}
  state = make_optimizer(optimizer_config(name="adafactor", beta1=0.0), lambda step: RATE).init(params)
  sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
  assert sizes == [1, 1, 1, 2 * 128, 2 * 256]


@pytest.mark.parametrize("name", ["adamw", "lion", "sophia", "galore", "adafactor", "muon", "sgd"])
def test_first_moments_can_be_kept_in_half_the_bytes(name):
  def state(dtype):
    optimizer = make_optimizer(optimizer_config(name=name, moment_dtype=dtype), lambda step: RATE)
    before = jax.eval_shape(optimizer.init, PARAMS)
    update = lambda state: optimizer.update(GRADIENTS[0], state, PARAMS, curvature=lambda: GRADIENTS[1])
    updates, after = jax.eval_shape(update, before)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    return jax.tree.leaves(before)

  whole, half = state("float32"), state("bfloat16")
  in_half = [leaf.size for leaf in half if leaf.dtype == jnp.bfloat16]
  assert len(in_half) == len(jax.tree.leaves(PARAMS))
  bytes_of = lambda leaves: sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  assert bytes_of(whole) - bytes_of(half) == 2 * sum(in_half)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rate_is_that_of_the_step_and_without_one_that_of_the_updates(name):
  config = optimizer_config(name=name, weight_decay=0.0)
  optimizer = make_optimizer(config, lambda step: 0.01 * (1 + step))
  params, curvature = {"x": {"kernel": jnp.ones((3, 4))}}, lambda: {"x": {"kernel": jnp.ones((3, 4))}}
  gradient = {"x": {"kernel": jax.random.normal(jax.random.key(0), (3, 4))}}
  update = lambda **extra: optimizer.update(gradient, optimizer.init(params), params, curvature=curvature, **extra)[0]
  np.testing.assert_allclose(4 * update()["x"]["kernel"], update(step=3)["x"]["kernel"], rtol=1e-4)


def test_the_logged_rate_is_the_applied_one_by_what_sgd_moves():
  config = optimizer_config(name="sgd", beta1=0.0, schedule="cosine", warmup_steps=5, weight_decay=0.0)
  schedule = make_schedule(config, 20)
  optimizer = make_optimizer(config, schedule)
  params = {"x": jnp.zeros(())}
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for step in range(20):
    updates, new_state = update({"x": jnp.ones(())}, state, params, step=jnp.int32(step))
    if step % 3:  # a step that is taken back keeps the old state; the clock goes on
      state = new_state
    np.testing.assert_allclose(-updates["x"], schedule(step), rtol=1e-6)


@pytest.mark.parametrize("name", ["lion", "sophia", "galore", "muon", "adafactor", "schedule_free", "sgd"])
def test_published_constants_make_a_config_of_that_optimizer(name):
  config = getattr(published, name)(base.get_config(), *([0.1] if name == "sgd" else []))
  optimizer = from_mapping(config.optimizer.to_dict(), OptimizerConfig, "optimizer.")
  make_optimizer(optimizer, lambda step: RATE)
  assert optimizer.name == name
  if name == "lion":
    assert (optimizer.learning_rate, optimizer.weight_decay) == pytest.approx((0.3 * 3e-4, 10 * 0.1))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_descends_a_quadratic(name):
  scales = jnp.array([[1.0, 3.0], [0.3, 2.0], [1.0, 0.5]])
  loss = lambda params: jnp.sum(scales * jnp.square(params["w"]["kernel"] - 1))
  optimizer = make_optimizer(optimizer_config(name=name, weight_decay=0.0, clip_norm=1.0), lambda step: 0.05)
  params = {"w": {"kernel": jnp.zeros((3, 2))}}
  state = optimizer.init(params)

  @jax.jit
  def step(params, state):
    curvature = lambda: {"w": {"kernel": 2 * scales}}
    updates, state = optimizer.update(jax.grad(loss)(params), state, params, curvature=curvature)
    return optax.apply_updates(params, updates), state

  before = loss(params)
  for _ in range(200):
    params, state = step(params, state)
  assert loss(params) < 0.2 * before
