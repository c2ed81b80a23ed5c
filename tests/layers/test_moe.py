import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import packed_context, tiny_model
from ultrathink_jax.layers.moe import Moe, _routing_losses
from ultrathink_jax.models.layer import MIXERS


def moe(context, **changes):
  module = MIXERS["E"].module(tiny_model(**changes))
  x = jax.random.normal(jax.random.key(1), (*context.positions.shape, 32))
  return module, x, jax.jit(module.init)(jax.random.key(0), x, context, None)["params"]


def plain(tree):
  return jax.tree.map(lambda leaf: getattr(leaf, "value", leaf), tree, is_leaf=lambda leaf: hasattr(leaf, "value"))


def losses(logits, context):
  probabilities = jax.nn.softmax(logits)
  _, choices = jax.lax.top_k(probabilities, 2)
  return _routing_losses(logits, probabilities, choices, context.segment_ids != 0)


def test_an_even_router_has_load_balance_one_and_a_collapsed_one_more():
  context = packed_context(1000, batch=2)
  even = losses(1e-3 * jax.random.normal(jax.random.key(0), (2, 1000, 4)), context)
  np.testing.assert_allclose(even["load_balance"], 1, rtol=0.05)
  collapsed = losses(jnp.zeros((2, 1000, 4)).at[..., :2].set(10.0), context)
  np.testing.assert_allclose(collapsed["load_balance"], 2, rtol=1e-3)


def test_the_z_loss_is_the_mean_square_of_the_log_normaliser_of_raw_logits():
  context = packed_context(5, -3)
  logits = jax.random.normal(jax.random.key(0), (1, 8, 4))
  expected = np.mean(np.log(np.exp(np.asarray(logits[0, :5], np.float64)).sum(-1)) ** 2)
  np.testing.assert_allclose(losses(logits, context)["router_z"], [expected], rtol=1e-5)
  assert losses(100 * logits, context)["router_z"] > 1000 * expected


def test_load_counts_the_choices_of_tokens_and_not_of_padding():
  module, x, params = moe(packed_context(5, -3))
  _, _, aux = module.apply({"params": params}, x, packed_context(5, -3), None)
  assert float(aux["load"].sum()) == 5 * 2
  assert float(aux["dropped"]) == 0


def test_a_tight_capacity_drops_and_counts():
  context = packed_context(64)
  module, x, params = moe(context, capacity_factor=0.5)
  y, _, aux = module.apply({"params": params}, x, context, None)
  assert isinstance(module, Moe)
  assert float(aux["dropped"]) >= 64
  full, _, _ = moe(context)[0].apply({"params": params}, x, context, None)
  assert float(jnp.abs(y - full).max()) > 0.01


@pytest.mark.parametrize("capacity_factor", [0.0, 1.0])
def test_experts_can_be_permuted(capacity_factor):
  context = packed_context(16)
  module, x, params = moe(context, capacity_factor=capacity_factor)
  params, order = plain(params), np.array([2, 0, 3, 1])
  permuted = {name: {"kernel": leaf["kernel"][order]} for name, leaf in params.items() if name != "router"}
  permuted["router"] = {"kernel": params["router"]["kernel"][:, order]}
  y, _, _ = module.apply({"params": params}, x, context, None)
  z, _, _ = module.apply({"params": permuted}, x, context, None)
  np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)
