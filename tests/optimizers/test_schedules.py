import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import tiny_config
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.optimizers.schedules import SCHEDULES, format_length, make_schedule, resolve_steps

PEAK, FLOOR, WARMUP, STEPS = 2.0, 0.5, 20, 140  # 120 steps after the warm-up
SHARE = np.arange(121) / 120  # of them, at each step
CLOSED_FORMS = {
  "constant": np.full(121, PEAK),
  "linear": PEAK + (FLOOR - PEAK) * SHARE,
  "cosine": FLOOR + (PEAK - FLOOR) * (1 + np.cos(np.pi * SHARE)) / 2,
  "polynomial": FLOOR + (PEAK - FLOOR) * (1 - SHARE) ** 0.7,
  "exponential": PEAK * (FLOOR / PEAK) ** SHARE,
  "cosine_restarts": FLOOR + (PEAK - FLOOR) * (1 + np.cos(np.pi * np.append(np.tile(np.arange(40) / 40, 3), 1.0))) / 2,
  "wsd": np.concatenate([np.full(85, PEAK), np.linspace(PEAK, FLOOR, 36)]),  # the last quarter of 140 steps
}


def schedule(name, **changes):
  config = dataclasses.replace(
    tiny_config().optimizer,
    schedule=name,
    learning_rate=PEAK,
    final_learning_rate_ratio=FLOOR / PEAK,
    warmup_steps=WARMUP,
    decay_power=0.7,
    decay_ratio=0.25,
    restarts=3,
  )
  return make_schedule(dataclasses.replace(config, **changes), STEPS)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_its_closed_form_behind_the_warm_up(name):
  rates = jax.jit(jax.vmap(schedule(name)))(jnp.arange(STEPS + 1))
  np.testing.assert_allclose(rates[:WARMUP], PEAK * np.arange(1, WARMUP + 1) / WARMUP, rtol=1e-6)
  np.testing.assert_allclose(rates[WARMUP:], CLOSED_FORMS[name], rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_stays_where_it_ended(name):
  np.testing.assert_allclose(schedule(name)(STEPS + 50), CLOSED_FORMS[name][-1], rtol=1e-6)


def test_a_warm_up_can_be_a_share_of_the_run():
  by_ratio, by_steps = schedule("cosine", warmup_ratio=0.1, warmup_steps=3), schedule("cosine", warmup_steps=14)
  np.testing.assert_array_equal(*(jax.vmap(s)(jnp.arange(STEPS)) for s in (by_ratio, by_steps)))


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("exponential", {"final_learning_rate_ratio": 0.0}, "final_learning_rate_ratio=0.0 .* choose a value above 0"),
    ("cosine", {"warmup_ratio": 0.999}, "warmup_ratio=0.999 leaves nothing of train.steps=140; choose at most 0.993"),
  ],
)
def test_a_schedule_without_an_end_or_a_run_is_refused(name, changes, message):
  with pytest.raises(ConfigError, match=message):
    schedule(name, **changes)


def train(**changes):
  return dataclasses.replace(tiny_config().train, batch_size=4, sequence_length=10, steps=7, **changes)


@pytest.mark.parametrize(
  ("changes", "rows", "steps"),
  [
    ({}, None, 7),
    ({"tokens": 400}, None, 10),
    ({"tokens": 401}, 8, 11),
    ({"tokens": 1}, None, 1),
    ({"epochs": 1.0}, 20, 5),
    ({"epochs": 2.5}, 20, 13),
    ({"epochs": 0.1}, 40, 1),
    ({"epochs": 0.001}, 20, 1),
    ({"epochs": 3.0}, 10_000_000, 7_500_000),
  ],
)
def test_a_run_is_the_fewest_steps_that_read_so_much(changes, rows, steps):
  assert resolve_steps(train(**changes), rows) == steps


def test_epochs_of_data_without_a_length_are_refused():
  with pytest.raises(ConfigError, match=r"train\.epochs=2 of data whose length is not known"):
    resolve_steps(train(epochs=2.0), None)


def test_the_length_of_a_run_reads_as_steps_tokens_and_epochs():
  assert format_length(train(), 1000, None) == "1,000 steps of 4 x 10 tokens = 40,000 tokens"
  line = format_length(train(epochs=1.5), 15, 40)
  assert line == "15 steps of 4 x 10 tokens = 600 tokens = 1.50 epochs (for train.epochs=1.5)"
