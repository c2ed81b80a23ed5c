import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import packed_context, tiny_config, tiny_model
from ultrathink_jax.losses.language_modeling import language_modeling_loss
from ultrathink_jax.models.language_model import LanguageModel, in_compute_dtype, init_cache, init_params, logits
from ultrathink_jax.types import Batch, Context

MODEL = tiny_model(layers="(MAFE)x2 L")
LOSS = tiny_config().loss


@pytest.fixture(scope="module")
def params():
  return jax.jit(lambda: init_params(MODEL, jax.random.key(0)))()


def tokens(*shape):
  return jax.random.randint(jax.random.key(1), shape, 0, MODEL.vocab_size)


@partial(jax.jit, static_argnames="model")
def apply(params, tokens, context, cache=None, model=MODEL):
  return LanguageModel(model).apply({"params": params}, tokens, context, cache)


def test_hidden_states_have_no_gradient_from_later_inputs(params):
  context = packed_context(20)

  def hidden(table):
    one_hot = jnp.arange(20)[None]  # token t reads row t of the table, so rows of the table are inputs
    changed = params | {"embedding": {"table": table}}
    return apply(changed, one_hot, context).hidden.sum(axis=(0, 2))

  influence = np.abs(jax.jit(jax.jacrev(hidden))(params["embedding"]["table"])).max(axis=-1)[:, :20]
  assert np.all(influence[np.triu_indices(20, 1)] == 0)
  assert np.all(np.diag(influence) > 0)


def test_packed_documents_equal_separate_ones(params):
  row = tokens(1, 30)
  packed = apply(params, row, packed_context(12, 8, 10)).hidden
  for start, end in ((0, 12), (12, 20), (20, 30)):
    alone = apply(params, row[:, start:end], packed_context(end - start)).hidden
    np.testing.assert_allclose(packed[:, start:end], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 7])
def test_prefill_then_decode_equals_full_forward(params, batch):
  row, context = tokens(batch, 21), packed_context(21, batch=batch)
  full = logits(apply(params, row, context))
  part = lambda start, end: jax.tree.map(lambda x: x[:, start:end], context)
  step = partial(apply, params)
  output = step(row[:, :9], part(0, 9), init_cache(MODEL, batch, 32))
  np.testing.assert_allclose(logits(output), full[:, :9], rtol=1e-4, atol=1e-5)
  output = step(row[:, 9:13], part(9, 13), output.cache)  # a second chunk of the prompt
  np.testing.assert_allclose(logits(output), full[:, 9:13], rtol=1e-4, atol=1e-5)
  for t in range(13, 21):
    output = step(row[:, t : t + 1], part(t, t + 1), output.cache)
    np.testing.assert_allclose(logits(output)[:, 0], full[:, t], rtol=1e-4, atol=1e-5)


def test_padding_behind_a_prompt_changes_nothing(params):
  row = tokens(1, 12)
  exact = apply(params, row[:, :7], packed_context(7), init_cache(MODEL, 1, 32))
  padded = apply(params, row, packed_context(7, -5), init_cache(MODEL, 1, 32))
  np.testing.assert_allclose(padded.hidden[:, :7], exact.hidden, rtol=1e-5, atol=1e-5)
  next_token, at = row[:, :1], Context(jnp.array([[7]]), jnp.array([[1]]))
  np.testing.assert_allclose(
    apply(params, next_token, at, padded.cache).hidden,
    apply(params, next_token, at, exact.cache).hidden,
    rtol=1e-5,
    atol=1e-5,
  )


def test_remat_and_unroll_change_nothing():
  params = jax.jit(lambda: init_params(tiny_model(layers="(MAE)x2"), jax.random.key(0)))()
  row, context = tokens(2, 16), packed_context(16, batch=2)

  def gradient(model):
    loss = lambda params: jnp.sum(jnp.sin(apply(params, row, context, model=model).hidden))
    return jax.jit(jax.grad(loss))(params)

  reference = gradient(tiny_model(layers="(MAE)x2"))
  for changes in ({"remat": "full"}, {"remat": "dots"}, {"remat": "offload"}, {"unroll": 1}):
    other = gradient(tiny_model(layers="(MAE)x2", **changes))
    for ours, plain in zip(jax.tree.leaves(other), jax.tree.leaves(reference), strict=True):
      np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-5)


def test_every_trainable_leaf_gets_a_gradient(params):
  row = tokens(4, 64)
  context = packed_context(40, 24, batch=4)
  batch = Batch(row, jnp.roll(row, -1, axis=1), jnp.ones((4, 64)), context)
  loss = lambda params: language_modeling_loss(apply(params, row, context), batch, LOSS)[0]
  for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
    per_layer = gradient if path[0].key.startswith("group") else gradient[None]
    assert bool(jnp.all(jnp.any(per_layer != 0, axis=tuple(range(1, per_layer.ndim))))), jax.tree_util.keystr(path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_model_is_uniform_on_random_tokens(tied):
  model = tiny_model(layers="(MAFE)x2", vocab_size=500, embed_dim=64, tie_embeddings=tied)
  row = jax.random.randint(jax.random.key(2), (8, 128), 0, 500)
  targets = jax.random.randint(jax.random.key(3), (8, 128), 0, 500)
  context = packed_context(128, batch=8)
  batch = Batch(row, targets, jnp.ones((8, 128)), context)
  output = apply(jax.jit(lambda: init_params(model, jax.random.key(0)))(), row, context, model=model)
  loss, info = language_modeling_loss(
    output, batch, dataclasses.replace(LOSS, load_balance_weight=0.0, router_z_weight=0.0)
  )
  assert abs(float(loss / info.weight) - np.log(500)) < 0.05


@pytest.mark.parametrize("length", [1, 4, 33])
def test_the_number_of_expert_layers_does_not_depend_on_length(params, length):
  output = apply(params, tokens(1, length), packed_context(length))
  assert {path: values["load"].shape for path, values in output.aux.items() if "load" in values} == {
    "group_0/moe_3": (2, 4)
  }
  assert float(output.aux["group_0/moe_3"]["load"].sum()) == 2 * 2 * length


def test_taps_are_the_residual_stream_after_each_layer(params):
  output = apply(params, tokens(1, 6), packed_context(6))
  assert {path: tap.shape for path, tap in output.taps.items()} == {
    **{f"group_0/{name}": (2, 1, 6, 32) for name in ("mamba_0", "attention_1", "mlp_2", "moe_3")},
    "group_1/window_0": (1, 1, 6, 32),
  }


def test_bfloat16_activations_stay_near_float32(params):
  row, context = tokens(2, 32), packed_context(32, batch=2)
  exact = logits(apply(params, row, context))
  half = apply(params, row, context, model=tiny_model(layers=MODEL.layers, dtype="bfloat16"))
  assert half.hidden.dtype == jnp.bfloat16
  np.testing.assert_allclose(logits(half), exact, atol=0.03)


@pytest.mark.parametrize(
  "changes", [{"tie_embeddings": True}, {"router": "grouped", "expert_groups": "knowledge=2,skill=2"}]
)
def test_parameters_in_the_compute_dtype_give_the_same_bits(changes):
  model = tiny_model(layers="MAFE", dtype="bfloat16", num_experts=4, **changes)
  params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
  rounded = in_compute_dtype(model, params)
  output = lambda params: apply(params, tokens(2, 16), packed_context(16, batch=2), model=model)
  np.testing.assert_array_equal(logits(output(rounded)), logits(output(params)))
  sizes = {
    dtype: sum(x.size for x in jax.tree.leaves(rounded) if x.dtype == dtype) for dtype in ("float32", "bfloat16")
  }
  assert sizes["bfloat16"] > 10 * sizes["float32"]
