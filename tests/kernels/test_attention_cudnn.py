import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import packed_context
from tests.kernels.test_attention import inputs, where
from tests.kernels.test_attention_pallas import lowers_for_gpu, pytestmark  # noqa: F401
from ultrathink_jax.kernels.attention import Scoring, attention
from ultrathink_jax.kernels.attention_cudnn import attention_cudnn, find_documents

SEGMENTS = np.array([[1, 1, 2, 2, 2, 7, 0, 0], [5] * 8, [1, 2, 3, 3, 4, 4, 4, 9], [0] * 8], np.int32)


def test_documents_are_the_runs_of_equal_ids():
  found = find_documents(jnp.asarray(SEGMENTS), 3)
  for row, starts, lengths, count in zip(SEGMENTS, *found, strict=True):
    runs = [t for t in range(8) if t == 0 or row[t] != row[t - 1]]
    sizes = [int(np.sum(row == row[t])) for t in runs]
    fill = lambda values, size: (values[:3] + [-1] * size)[:size]
    np.testing.assert_array_equal(starts, fill(runs, 4))
    np.testing.assert_array_equal(lengths, fill(sizes, 3))
    assert int(count) == len(runs)


@pytest.mark.parametrize("window_tokens", [None, 3])
def test_attention_inside_each_document_is_attention_over_the_row(window_tokens):
  """What cuDNN is asked for, by the XLA implementation of the same call: causal, a window, documents by themselves."""
  context = packed_context(9, 1, 5, -3)
  query, key, value = inputs(18, batch=1)
  scoring = Scoring(0.3, None, window_tokens)
  expected = np.zeros(query.shape, np.float32)
  documents = jax.tree.map(np.asarray, find_documents(context.segment_ids, 4))
  for start, length in zip(documents.starts[0], documents.lengths[0], strict=False):
    if length > 0 and context.segment_ids[0, start] != 0:
      own = slice(start, start + length)
      expected[:, own] = jax.nn.dot_product_attention(
        *(array[:, own] for array in (query, key, value)),
        scale=scoring.scale,
        is_causal=True,
        local_window_size=None if window_tokens is None else (window_tokens - 1, 0),
        implementation="xla",
      )
  np.testing.assert_allclose(attention(query, key, value, *where(context), scoring), expected, rtol=1e-5, atol=1e-5)


@lowers_for_gpu
def test_the_call_lowers_for_gpu_without_an_array_over_pairs_of_tokens(monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as fused

  monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_000)
  monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
  monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: False)
  shape = lambda heads: jax.ShapeDtypeStruct((2, 1024, heads, 64), jnp.bfloat16)
  places = jax.ShapeDtypeStruct((2, 1024), jnp.int32)

  def gradient(q, k, v, places):
    loss = lambda *arrays: jnp.sum(attention_cudnn(*arrays, *(places,) * 4, Scoring(0.1, None, 100)))
    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

  program = jax.jit(gradient).trace(shape(4), shape(2), shape(2), places).lower(lowering_platforms=("cuda",)).as_text()
  assert "__cudnn$fmhaSoftmaxBackward" in program
  assert "1024x1024" not in program


@pytest.mark.gpu
@pytest.mark.parametrize("window_tokens", [None, 100])
@pytest.mark.parametrize("num_documents", [1, 4, 40])  # 40 are more than cuDNN is given room for
def test_cudnn_equals_the_plain_form(window_tokens, num_documents):
  context = packed_context(*[1000 // num_documents] * num_documents, -24, batch=2)
  arrays = [jnp.tile(a, (1, 1, 1, 8)).astype(jnp.bfloat16) for a in inputs(context.positions.shape[1])]

  def outputs(function):
    loss = lambda *qkv: jnp.sum(
      jnp.sin(function(*qkv, *where(context), Scoring(0.1, None, window_tokens)).astype(jnp.float32))
    )
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)

  for ours, plain in zip(*(jax.tree.leaves(outputs(f)) for f in (attention_cudnn, attention)), strict=True):
    np.testing.assert_allclose(ours.astype(jnp.float32), plain.astype(jnp.float32), rtol=0.05, atol=0.05)
