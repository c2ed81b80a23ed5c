"""Which steps count, and what those that do not leave behind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import packed_context, tiny_config
from ultrathink_jax.config import GuardConfig
from ultrathink_jax.optimizers.optimizers import make_optimizer
from ultrathink_jax.recipes.pretrain import make_pretrain
from ultrathink_jax.train import guard
from ultrathink_jax.train.state import make_init
from ultrathink_jax.train.step import make_train_step
from ultrathink_jax.types import Batch

CONFIG = GuardConfig(spike_sigmas=6.0, window_steps=16, max_skipped=3, max_rollbacks=1)
JUDGE = jax.jit(guard.judge, static_argnums=0)


def judged(values, config=CONFIG):
  """Returns which of the losses count, their norms being 1, and the last state."""
  state, counted = guard.begin(config), []
  for value in values:
    counts, state = JUDGE(config, state, jnp.float32(value), jnp.float32(1.0))
    counted.append(bool(counts))
  return counted, state


@pytest.fixture(scope="module")
def first_step():
  """Returns the first state of a tiny run, a batch, and its train step."""
  config = tiny_config()
  recipe = make_pretrain(config)
  optimizer = make_optimizer(config.optimizer, lambda step: 1e-3)
  state, _ = jax.jit(make_init(config, recipe, optimizer))()
  tokens = jax.random.randint(jax.random.key(1), (8, 12), 0, 64)
  batch = Batch(tokens, jnp.roll(tokens, -1, axis=1), jnp.ones((8, 12)), packed_context(7, 5, batch=8))
  return state, batch, jax.jit(make_train_step(config, recipe, optimizer))


def test_a_value_far_above_those_of_late_does_not_count_and_one_close_to_them_does():
  usual = list(2 + 0.1 * np.random.default_rng(0).normal(size=40))
  counted, state = judged([*usual, 5.0, 2.1])
  assert counted == [True] * 40 + [False, True]
  assert (int(state.skipped), int(state.skipped_in_a_row)) == (1, 0)


def test_the_threshold_is_mean_and_deviations_of_the_window():
  values = np.random.default_rng(1).normal(size=16).astype(np.float32)
  _, state = judged(values)
  most = values.mean() + 6 * values.std()
  for value, counts in ((most - 1e-3, True), (most + 1e-3, False)):
    assert bool(JUDGE(CONFIG, state, jnp.float32(value), jnp.float32(1.0))[0]) == counts


def test_nothing_is_a_spike_before_half_of_the_window_is_known():
  counted, _ = judged([1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 100.0])
  assert all(counted)
  counted, _ = judged([1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 1.1, 100.0])
  assert not counted[-1]


def test_what_becomes_the_rule_counts_again():
  usual = list(2 + 0.1 * np.random.default_rng(0).normal(size=32))
  counted, _ = judged([*usual, *[6.0] * 16])
  assert not counted[32]
  assert counted[-1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_never_counts_nor_enters_the_window(value):
  for config in (CONFIG, dataclasses.replace(CONFIG, spike_sigmas=0.0)):
    counted, state = judged([1.0, value, value, 1.0, value], config)
    assert counted == [True, False, False, True, False]
    assert (int(state.skipped), int(state.skipped_in_a_row), int(state.recorded)) == (3, 1, 2)
    assert np.isfinite(state.window).all()


def test_without_sigmas_all_that_is_finite_counts():
  assert all(judged([1.0] * 20 + [1e30], dataclasses.replace(CONFIG, spike_sigmas=0.0))[0])


def test_a_step_that_does_not_count_leaves_parameters_and_optimizer_as_they_were(first_step):
  state, good, step = first_step
  state, _ = step(state, None, good)
  after, metrics = step(state, None, good._replace(weights=good.weights.at[3].set(jnp.nan)))
  assert (int(after.step), int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (2, 1, 1)
  for now, before in zip(jax.tree.leaves(after[1:3]), jax.tree.leaves(state[1:3]), strict=True):
    np.testing.assert_array_equal(now, before)
  moved, metrics = step(after, None, good)
  assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (1, 0)
  assert not np.array_equal(moved.params["embedding"]["table"], after.params["embedding"]["table"])


def test_gradient_norms_of_the_components_make_up_the_whole(first_step):
  state, batch, step = first_step
  _, metrics = step(state, None, batch)
  parts = [float(value) for name, value in metrics.items() if name.startswith("grad_norm/")]
  assert len(parts) >= 6
  np.testing.assert_allclose(np.sqrt(np.sum(np.square(parts))), metrics["grad_norm"], rtol=1e-5)
