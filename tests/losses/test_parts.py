import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import packed_context, tiny_config, tiny_model
from ultrathink_jax.layers.mamba import SCAN_LOSS
from ultrathink_jax.models.language_model import LanguageModel, init_params
from ultrathink_jax.recipes.pretrain import make_pretrain
from ultrathink_jax.types import Batch

LENGTH = 16


def batch():
  tokens = jax.random.randint(jax.random.key(1), (4, LENGTH), 0, 64)
  weights = jax.random.uniform(jax.random.key(2), (4, LENGTH))
  return Batch(tokens, jnp.roll(tokens, -1, 1), weights, packed_context(9, 4, -3, batch=4))


def run(layers, **weights):
  """Returns the gradient of a tiny model's loss, and what is reported of the step."""
  config = dataclasses.replace(tiny_config(loss=weights), model=tiny_model(layers=layers))
  recipe = make_pretrain(config)
  params, _ = jax.jit(recipe.init)(jax.random.key(0))
  loss = jax.jit(
    jax.value_and_grad(lambda p, b: recipe.loss(p, None, b, jnp.int32(0), jax.random.key(0)), has_aux=True)
  )
  (_, info), gradients = loss(params, batch())
  return gradients, recipe.summarize(jax.device_get(info.metrics | {"weight": info.weight}))


@pytest.mark.parametrize("layers", ["MAE", "(M)x2", "F"])
def test_the_weighted_parts_of_a_loss_sum_to_it(layers):
  _, values = run(layers, label_smoothing=0.1, z_weight=0.02, scan_weight=0.3, router_entropy_weight=0.04)
  parts = {name for name in values if name.endswith("_weighted")}
  expected = {"lm", "smoothing", "z", "scan"}
  expected |= {"load_balance", "router_z", "router_importance", "router_entropy"} if "E" in layers else set()
  assert parts == {f"loss/{name}_weighted" for name in expected}
  np.testing.assert_allclose(sum(values[name] for name in parts), values["loss/total"], rtol=1e-6)
  np.testing.assert_allclose(values["loss/lm_weighted"], 0.9 * values["loss"], rtol=1e-6)
  np.testing.assert_allclose(values["loss/z_weighted"], 0.02 * values["loss/z"], rtol=1e-6)
  assert values["loss/z"] > 1
  assert (values["loss/scan"] > 0) == ("M" in layers)


def test_without_weights_the_loss_has_one_part():
  _, values = run("(M)x2")
  assert values.keys() == {"loss"}


def test_the_loss_of_the_scan_is_the_mean_squared_log_decay_of_its_tokens():
  model = tiny_model(layers="(M)x2")
  params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
  rows = batch()
  apply = lambda context: LanguageModel(model).apply({"params": params}, rows.tokens, context)
  output = apply(rows.context)
  assert output.aux["group_0/mamba_0"][SCAN_LOSS].shape == (2, 4)
  mixer = jax.tree.map(lambda leaf: leaf[0], params["group_0"]["mamba_0"])
  x = params["embedding"]["table"][rows.tokens]
  x = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + model.norm_epsilon) * mixer["norm"]["scale"]
  dt = jax.nn.softplus(x @ mixer["mixer"]["dt"]["kernel"] + mixer["mixer"]["dt_bias"])
  log_decay = np.asarray(dt * jnp.exp(mixer["mixer"]["a_log"]))[:, :13]  # the last three are padding
  expected = np.mean(log_decay**2, axis=(1, 2))
  np.testing.assert_allclose(output.aux["group_0/mamba_0"][SCAN_LOSS][0], expected, rtol=1e-4)


def test_the_scan_weight_pulls_at_decays_and_at_nothing_behind_them():
  plain, _ = run("M")
  pulled, _ = run("M", scan_weight=2.0)
  mixers = [tree["group_0"]["mamba_0"]["mixer"] for tree in (plain, pulled)]
  same = lambda *names: [np.allclose(mixers[0][name], mixers[1][name], rtol=1e-5, atol=1e-8) for name in names]
  assert not any(same("a_log", "dt_bias"))
  assert same("d") == [True]
