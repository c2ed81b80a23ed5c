import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu

from tests.conftest import packed_context
from tests.kernels.test_attention import SINKS, inputs, where
from ultrathink_jax.kernels import attention_pallas as attention_pallas_module
from ultrathink_jax.kernels.attention import Scoring, attention
from ultrathink_jax.kernels.attention_pallas import attention_pallas, first_keys

# JAX 0.12 still runs Triton kernels, with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
lowers_for_gpu = pytest.mark.skipif(
  jax.__version_info__ > (0, 10, 2), reason="from JAX 0.11 on, lowering compiles the kernel, which takes a GPU"
)

# In the interpreter blocks are 16 tokens: documents begin and end inside blocks, and the last block is not full.
CONTEXT = packed_context(21, 1, 16, -3, batch=2)
SCORINGS = [
  (Scoring(8**-0.5), None),
  (Scoring(0.5, None, 7), SINKS),
  (Scoring(0.5, 0.7, 1000), SINKS),
  (Scoring(0.5, 0.7, 1), None),
]


def run_as_on_tpu(monkeypatch, module):
  monkeypatch.setattr(module, "on_platform", lambda function, *arrays: function("tpu", *arrays))


def outputs(function, arrays, context, scoring):
  loss = lambda q, k, v, *sinks: jnp.sum(
    jnp.sin(function(q, k, v, *where(context), scoring, *sinks).astype(jnp.float32))
  )
  return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arrays)))))(*arrays)


def assert_equal(arrays, context, scoring, **tolerance):
  both = (jax.tree.leaves(outputs(f, arrays, context, scoring)) for f in (attention_pallas, attention))
  for ours, plain in zip(*both, strict=True):
    assert ours.dtype == plain.dtype
    np.testing.assert_allclose(ours.astype(jnp.float32), plain.astype(jnp.float32), **tolerance)


@pytest.mark.parametrize(("scoring", "sinks"), SCORINGS)
def test_the_kernels_equal_the_plain_form_forward_and_gradient(scoring, sinks):
  arrays = [*inputs(41), *([] if sinks is None else [sinks])]
  assert_equal(arrays, CONTEXT, scoring, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_any_number_of_query_heads_shares_keys(num_kv_heads):
  assert_equal(inputs(41, num_kv_heads=num_kv_heads), CONTEXT, Scoring(0.5), rtol=1e-5, atol=2e-5)


def test_bfloat16_stays_near_the_plain_form():
  # 8 bits of mantissa: products of rounded weights, and the mean of up to 21 of them.
  assert_equal(inputs(41, dtype=jnp.bfloat16), CONTEXT, Scoring(0.5), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("documents", [(1,), (-5,)])
def test_rows_of_any_length(documents):
  length = sum(map(abs, documents))
  assert_equal(inputs(length, batch=1), packed_context(*documents), Scoring(0.5), rtol=1e-5, atol=2e-5)


def test_a_token_of_another_document_changes_nothing():
  query, key, value = inputs(41)
  attend = lambda k, v: attention_pallas(query, k, v, *where(CONTEXT), Scoring(0.5))
  plain, changed = attend(key, value), attend(key.at[:, 5].set(100.0), value.at[:, 5].set(100.0))
  np.testing.assert_array_equal(plain[:, 21:38], changed[:, 21:38])
  np.testing.assert_array_equal(plain[:, 38:], 0)


@pytest.mark.parametrize("window_tokens", [None, 3])
def test_the_first_visible_key_of_each_query(window_tokens):
  segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0], [3, 1, 1, 1, 1, 1, 1, 1]], np.int32)
  first = np.asarray(first_keys(jnp.asarray(segments), window_tokens))
  for b, t in np.ndindex(segments.shape):
    seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t] and t - s < (window_tokens or 99)]
    assert first[b, t] == (seen[0] if segments[b, t] else 8)


def test_the_form_for_tpu_equals_the_plain_form(monkeypatch):
  run_as_on_tpu(monkeypatch, attention_pallas_module)
  with tpu.force_tpu_interpret_mode():
    assert_equal([*inputs(41), SINKS], CONTEXT, Scoring(0.5, 0.7, 7), rtol=1e-5, atol=2e-5)


@lowers_for_gpu
def test_the_kernels_lower_for_gpu():
  shape = lambda heads: jax.ShapeDtypeStruct((2, 300, heads, 64), jnp.bfloat16)
  places = jax.ShapeDtypeStruct((2, 300), jnp.int32)

  def gradient(q, k, v, places):
    loss = lambda *arrays: jnp.sum(attention_pallas(*arrays, *(places,) * 4, Scoring(0.1, 20.0, 100)))
    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

  program = jax.jit(gradient).trace(shape(4), shape(2), shape(2), places).lower(lowering_platforms=("cuda",))
  assert program.as_text().count("triton") >= 3  # forward, and two backward


@pytest.mark.gpu
@pytest.mark.tpu
@pytest.mark.parametrize(("scoring", "sinks"), SCORINGS)
def test_the_compiled_kernels_equal_the_plain_form(scoring, sinks):
  context = packed_context(700, 1, 290, -33, batch=2)
  arrays = [jnp.tile(a, (1, 1, 1, 8)).astype(jnp.bfloat16) for a in inputs(1024)]
  arrays += [] if sinks is None else [sinks]
  both = (jax.tree.leaves(outputs(f, arrays, context, scoring)) for f in (attention_pallas, attention))
  for ours, plain in zip(*both, strict=True):
    ours, plain = (np.asarray(array, np.float32) for array in (ours, plain))
    # 8 bits: 0.4 % each, a few in a row. Some gradients are 0, those of a query that sees one key.
    assert np.linalg.norm(ours - plain) < 0.01 * np.linalg.norm(plain) + 1e-3
