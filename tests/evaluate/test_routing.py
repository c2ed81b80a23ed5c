import numpy as np
import pytest

from tests.conftest import tiny_model
from ultrathink_jax.evaluate.routing import jensen_shannon, routing_shift, utilisation


def test_divergence_is_a_bit_of_disjoint_distributions_and_none_of_equal_ones():
  p = np.array([0.5, 0.5, 0, 0])
  assert jensen_shannon(p, p[::-1]) == pytest.approx(1)
  assert jensen_shannon(p, p) == 0


def test_divergence_is_the_information_that_a_draw_has_about_where_it_comes_from():
  random = np.random.default_rng(0)
  p, q = random.dirichlet(np.ones(6), 2)
  joint = np.stack([p, q]) / 2
  information = sum(
    joint[i, j] * np.log2(joint[i, j] / (joint[i].sum() * joint[:, j].sum())) for i in range(2) for j in range(6)
  )
  assert jensen_shannon(p, q) == pytest.approx(information)
  assert jensen_shannon(p, q) == jensen_shannon(q, p)


def test_even_use_has_entropy_1_and_one_expert_alone_0():
  even = utilisation(np.array([5.0, 5, 5, 5]))
  assert (even.entropy, even.busiest, even.variation, even.dead) == (pytest.approx(1), 1, 0, 0)
  alone = utilisation(np.array([0, 12.0, 0, 0]))
  assert (alone.entropy, alone.busiest, alone.dead) == (0, 4, 3)
  assert alone.shares == [0, 1, 0, 0]
  assert alone.variation == pytest.approx(np.sqrt(3))


def test_layers_are_numbered_as_in_the_whole_model():
  model = tiny_model(layers="A(EM)x2E")
  even, skewed = np.full((2, 4), 8.0), np.array([[8.0, 8, 8, 8], [29, 1, 1, 1]])
  before = {"group_1/moe_0": even, "group_2/moe_0": even[:1]}
  after = {"group_1/moe_0": skewed, "group_2/moe_0": even[:1]}
  shifts = routing_shift(model, before, after, 0.5)
  assert [shift.layer for shift in shifts] == [1, 3, 5]
  assert [shift.divergence > 0 for shift in shifts] == [False, True, False]
  assert [shift.is_collapsed for shift in shifts] == [False, True, False]
  assert not any(shift.is_collapsed for shift in routing_shift(model, before, after, 0))


def test_one_of_few_experts_may_have_a_large_share():
  model = tiny_model(layers="E")
  load = {"group_0/moe_0": np.array([[70.0, 10, 10, 10]])}
  assert routing_shift(model, load, load, 0.3)[0].is_collapsed
  load = {"group_0/moe_0": np.array([[45.0, 35, 10, 10]])}
  assert not routing_shift(model, load, load, 0.3)[0].is_collapsed
