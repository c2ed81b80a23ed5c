import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import packed_context, tiny_config
from ultrathink_jax.kernels.cross_entropy import cross_entropy
from ultrathink_jax.losses.language_modeling import language_modeling_loss
from ultrathink_jax.types import Batch, Output

LOSSES = ("load_balance", "router_z", "router_importance", "router_entropy")
WEIGHTS = jnp.array([[1.0, 0.5, 0.0], [2.0, 0.0, 0.0]])


def batch():
  tokens = jnp.array([[1, 2, 3], [4, 5, 6]])
  return Batch(tokens, tokens + 1, WEIGHTS, packed_context(3, batch=2))


def output(aux):
  hidden, unembedding = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((2, 3, 4), (8, 4))))
  return Output(hidden, unembedding, None, None, aux, {})


def layers(repeats, seed):
  keys = jax.random.split(jax.random.key(seed), len(LOSSES))
  rows = {name: jax.random.uniform(key, (repeats, 2)) for name, key in zip(LOSSES, keys, strict=True)}
  return rows | {"load": jnp.full((repeats, 4), 3.0), "dropped": jnp.ones(repeats)}


AUX = {"group_0/moe_1": layers(2, 0), "group_1/moe_0": layers(1, 1)}


def loss(aux=AUX, **weights):
  config = {"load_balance_weight": 0.1, "router_z_weight": 0.2}
  config |= {"router_importance_weight": 0.3, "router_entropy_weight": 0.4} | weights
  total, info = language_modeling_loss(output(aux), batch(), dataclasses.replace(tiny_config().loss, **config))
  return total, info.metrics


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_reaches_the_loss_exactly_once(name):
  one, metrics = loss(**{f"{name}_weight": 0.7})
  two, _ = loss(**{f"{name}_weight": 1.4})
  assert float(metrics[f"loss/{name}"]) > 0.1
  np.testing.assert_allclose(two - one, 0.7 * metrics[f"loss/{name}"], rtol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_routing_loss_is_the_mean_over_expert_layers_of_rows_by_their_weight(name):
  rows = np.concatenate([np.asarray(values[name]) for values in AUX.values()])
  expected = np.sum(rows.mean(0) * np.asarray(WEIGHTS.sum(1)))
  np.testing.assert_allclose(loss()[1][f"loss/{name}"], expected, rtol=1e-5)


def test_without_experts_the_loss_is_the_cross_entropy():
  total, metrics = loss({})
  b, out = batch(), output({})
  np.testing.assert_allclose(total, cross_entropy(out.hidden, out.unembedding, b.targets, b.weights), rtol=1e-5)
  assert metrics.keys() == {"loss/lm", "loss/total"}


def test_the_bias_of_a_router_adds_its_term_to_the_loss():
  plain, _ = loss()
  biased, _ = loss(AUX | {"group_1/moe_0": AUX["group_1/moe_0"] | {"router_bias": jnp.array([0.25])}})
  np.testing.assert_allclose(biased - plain, 0.25, rtol=1e-4)
