"""Adapters: what they add, what they begin as, and what they leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.lora.adapted_runs import base, batch, begin, disturbed, loss_and_gradient, make
from ultrathink_jax.layers.adapter import adapted, merged
from ultrathink_jax.lora.adapters import from_named, to_named
from ultrathink_jax.lora.adapting import adaptation_of
from ultrathink_jax.lora.merging import merge
from ultrathink_jax.models.language_model import LanguageModel, logits, variables
from ultrathink_jax.recipes import find_recipe
from ultrathink_jax.types import Adapter

VARIANTS = {
  "lora": {"rank": 4, "targets": ("all", "router")},
  "rslora": {"rank": 4, "scaling": "rslora"},
  "dora": {"rank": 4, "variant": "dora", "targets": ("attention", "mamba", "mlp")},
  "pissa": {"rank": 4, "init": "pissa", "targets": ("all",)},
  "some layers": {"rank": 4, "targets": ("layers.1.*", "layers.7.moe.up", "*.x"), "rank_pattern": ("layers.0.*=2",)},
}


@pytest.fixture(scope="module", params=VARIANTS)
def run(request):
  config = make(VARIANTS[request.param])
  return config, *begin(config)


def _logits(weights):
  model = LanguageModel(make().model)
  of = jax.jit(lambda weights, batch: logits(model.apply(variables(weights), batch.tokens, batch.context)))
  return np.asarray(of(weights, batch()))


def test_at_first_a_model_is_its_base_bit_for_bit(run):
  _, recipe, params, frozen = run
  np.testing.assert_array_equal(_logits(recipe.weights(params, frozen)), _logits(base()))


def test_every_trained_leaf_has_a_gradient_in_time(run):
  _, recipe, params, frozen = run
  _, gradients = loss_and_gradient(recipe, disturbed(params), frozen)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.isfinite(leaf).all()
    assert np.abs(leaf).max() > 0, path


def test_a_merged_model_computes_the_same(run):
  _, recipe, params, frozen = run
  weights = recipe.weights(disturbed(params), frozen)
  ours = _logits(weights)
  assert np.abs(ours - _logits(base())).max() > 0.05
  np.testing.assert_allclose(_logits(jax.tree.map(jnp.asarray, merge(weights))), ours, rtol=0, atol=2e-5)


def test_adapters_by_name_are_those_of_the_tree(run):
  config, _, params, frozen = run
  if config.lora.init == "pissa":
    pytest.skip("what PiSSA takes off is a part of them by name")
  params = jax.tree.map(lambda leaf, like: leaf * (like != 0), disturbed(params), params)  # beyond a rank there is 0
  adaptation = adaptation_of(config)
  named = to_named(adaptation.targets, config.lora, params["lora"], frozen.start)
  back = from_named(adaptation.targets, named)
  jax.tree.map(np.testing.assert_array_equal, back, params["lora"])


def test_axes_have_the_shape_of_what_they_describe(run):
  _, recipe, params, frozen = run
  is_axes = lambda leaf: isinstance(leaf, tuple) and not hasattr(leaf, "_fields")
  for axes, tree in ((recipe.axes, params), (recipe.frozen_axes, frozen)):
    matched = jax.tree.map(lambda names, leaf: len(names) == leaf.ndim, axes, tree, is_leaf=is_axes)
    assert all(jax.tree.leaves(matched))


@pytest.mark.parametrize("has_magnitude", [False, True])
def test_an_adapter_follows_the_formula_of_its_paper(has_magnitude):
  numbers = np.random.default_rng(0)
  x, w, a, b = (numbers.normal(size=shape) for shape in ((5, 8), (8, 6), (8, 3), (3, 6)))
  magnitude = numbers.uniform(1, 2, 6) if has_magnitude else None
  whole = w + 0.5 * a @ b
  if has_magnitude:
    whole *= magnitude / np.linalg.norm(whole, axis=0)
  adapter = Adapter(*map(jnp.float32, (a, b)), jnp.float32(0.5), None if magnitude is None else jnp.float32(magnitude))
  y = adapted(jnp.float32(x), jnp.float32(x @ w), jnp.float32(w), adapter, lambda: jax.random.key(0))
  np.testing.assert_allclose(y, x @ whole, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(merged(jnp.float32(w), adapter), whole, rtol=1e-5, atol=1e-5)


def test_the_length_of_a_column_has_no_gradient_as_in_dora():
  x, w = jnp.ones((1, 2)), jnp.array([[3.0], [4.0]])
  make_adapter = lambda b: Adapter(jnp.array([[1.0], [0.0]]), b, jnp.float32(1), jnp.array([5.0]))
  of = lambda b: adapted(x, x @ w, w, make_adapter(b), lambda: None)[0, 0]
  np.testing.assert_allclose(jax.grad(of)(jnp.zeros((1, 1))), [[1.0]])  # magnitude / length x A, length 5 held still


def test_dropout_keeps_the_mean_and_is_of_training_alone():
  x, adapter = (
    jnp.ones((20_000, 4)),
    Adapter(jnp.ones((4, 1)), jnp.ones((1, 1)), jnp.float32(1), dropout=jnp.float32(0.25)),
  )
  y = adapted(x, jnp.zeros((20_000, 1)), jnp.zeros((4, 1)), adapter, lambda: jax.random.key(0))
  assert abs(float(y.mean()) - 4) < 0.05
  assert float(y.std()) > 0.5
  config = make({"rank": 4, "dropout": 0.5})
  recipe, params, frozen = begin(config)
  noisy = disturbed(params)
  losses = {
    float(jax.jit(lambda key: recipe.loss(noisy, frozen, batch(), jnp.int32(0), key)[0])(jax.random.key(n)))
    for n in range(3)
  }
  assert len(losses) == 3
  collection = recipe.weights(noisy, frozen).lora
  assert all(
    adapter.dropout is None for adapter in jax.tree.leaves(collection, is_leaf=lambda x: isinstance(x, Adapter))
  )


def test_pissa_begins_as_the_nearest_matrix_of_its_rank():
  config = make({"rank": 4, "alpha": 2.0, "init": "pissa"})
  _, _, frozen = begin(config)
  query = frozen.start["group_0"]["attention_1"]["mixer"]["query"]
  ours = 2.0 / 4 * np.asarray(query["lora_a"][1] @ query["lora_b"][1])
  kernel = np.asarray(base()["group_0"]["attention_1"]["mixer"]["query"]["kernel"][1]).reshape(ours.shape)
  left, values, right = np.linalg.svd(kernel)
  np.testing.assert_allclose(ours, left[:, :4] * values[:4] @ right[:4], atol=1e-5)


def test_the_rate_of_b_is_that_of_lora_plus():
  from ultrathink_jax.lora.adapting import optimizer_of
  from ultrathink_jax.optimizers.groups import groups

  config = make({"rank": 4, "rate_ratio": 16.0})
  _, params, _ = begin(config)
  rates = {name: group.rate for name, group in groups(optimizer_of(config), params).items()}
  assert {rate for name, rate in rates.items() if name.endswith("lora_b")} == {16.0}
  assert {rate for name, rate in rates.items() if name.endswith("lora_a")} == {1.0}


def test_a_recipe_over_a_base_is_found_by_its_name():
  assert find_recipe(make()).frozen_axes is None
  assert find_recipe(make({"rank": 4})).frozen_axes is not None
