import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu

from tests.kernels.test_attention_pallas import lowers_for_gpu, pytestmark, run_as_on_tpu  # noqa: F401
from tests.kernels.test_experts import E, K, inputs
from ultrathink_jax.kernels import experts_pallas as grouped
from ultrathink_jax.kernels.experts import experts


def outputs(function, x, choices, gates, kernels, capacity, activation):
  def loss(x, gates, kernels):
    gate, up, down = kernels
    y, is_computed = function(
      x, choices, gates, gate if activation == "swiglu" else None, up, down, capacity, activation
    )
    return jnp.sum(jnp.sin(y.astype(jnp.float32))), is_computed

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x, gates, kernels)


@pytest.mark.parametrize(
  ("capacity", "activation", "dtype"),
  [
    (None, "swiglu", jnp.float32),
    (None, "relu2", jnp.float32),
    (1, "swiglu", jnp.float32),
    (1000, "gelu", jnp.float32),
    (6, "swiglu", jnp.bfloat16),
  ],
)
def test_grouped_products_equal_the_plain_form_forward_and_gradient(capacity, activation, dtype):
  arrays = inputs(dtype)
  both = (outputs(f, *arrays, capacity, activation) for f in (grouped.experts_pallas, experts))
  ((_, kept), gradients), ((_, kept_plain), gradients_plain) = both
  np.testing.assert_array_equal(kept, kept_plain)
  # bfloat16: the plain form rounds each of a token's products before it adds them up, this one their sum.
  tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == jnp.float32 else {"rtol": 0.1, "atol": 0.5}
  for ours, plain in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_plain), strict=True):
    assert ours.dtype == plain.dtype
    np.testing.assert_allclose(ours.astype(jnp.float32), plain.astype(jnp.float32), **tolerance)


def test_an_expert_may_take_several_blocks_and_another_none(monkeypatch):
  monkeypatch.setattr(grouped, "BLOCK_ROWS", 16)
  monkeypatch.setattr(grouped, "_STEP", 16)
  x, choices, gates, kernels = inputs()
  choices = jnp.where(choices == 3, 1, choices).at[:, 0].set(0)
  assert int(jnp.sum(choices == 0)) > 2 * grouped.BLOCK_ROWS
  both = (outputs(f, x, choices, gates, kernels, None, "swiglu") for f in (grouped.experts_pallas, experts))
  for ours, plain in zip(*map(jax.tree.leaves, both), strict=True):
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_the_form_for_tpu_equals_the_plain_form(monkeypatch):
  run_as_on_tpu(monkeypatch, grouped)
  arrays = inputs()
  with tpu.force_tpu_interpret_mode():
    as_on_tpu = outputs(grouped.experts_pallas, *arrays, 6, "swiglu")
  expected = outputs(experts, *arrays, 6, "swiglu")
  for ours, plain in zip(*map(jax.tree.leaves, (as_on_tpu, expected)), strict=True):
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_a_batch_without_any_routed_token_is_zero():
  x, choices, gates, kernels = inputs()
  y, is_computed = grouped.experts_pallas(x, jnp.full_like(choices, E), gates, *kernels)
  np.testing.assert_array_equal(y, 0)
  assert not bool(is_computed.any())


@lowers_for_gpu
def test_the_kernels_lower_for_gpu():
  shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
  arrays = (shape(300, 64), shape(300, K, dtype=jnp.float32), shape(4, 64, 96), shape(4, 64, 96), shape(4, 96, 64))

  def gradient(choices, *arrays):
    loss = lambda x, *rest: jnp.sum(grouped.experts_pallas(x, choices, *rest)[0])
    return jax.grad(loss, argnums=range(5))(*arrays)

  program = jax.jit(gradient).trace(shape(300, K, dtype=jnp.int32), *arrays).lower(lowering_platforms=("cuda",))
  assert program.as_text().count("triton") >= 8  # the last product forward is not needed for gradients


@pytest.mark.gpu
@pytest.mark.tpu
@pytest.mark.parametrize("capacity", [None, 100])
def test_the_compiled_products_equal_the_plain_form(capacity):
  keys = jax.random.split(jax.random.key(0), 6)
  x = jax.random.normal(keys[0], (1000, 256), jnp.bfloat16)
  choices = jax.random.randint(keys[1], (1000, 1), 0, 9)
  gates = jax.random.uniform(keys[2], (1000, 1))
  shapes = [(8, 256, 384), (8, 256, 384), (8, 384, 256)]
  kernels = [0.05 * jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys[3:], shapes, strict=True)]
  both = (outputs(f, x, choices, gates, kernels, capacity, "swiglu") for f in (grouped.experts_pallas, experts))
  for ours, plain in zip(*map(jax.tree.leaves, both), strict=True):
    scale = max(1e-3, float(jnp.abs(plain.astype(jnp.float32)).max()))
    assert float(jnp.abs(ours.astype(jnp.float32) - plain.astype(jnp.float32)).max()) < 0.03 * scale
