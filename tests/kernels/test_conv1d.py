import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import packed_context
from ultrathink_jax.kernels.conv1d import conv1d

KEYS = jax.random.split(jax.random.key(0))
X = jax.random.normal(KEYS[0], (2, 15, 6))
KERNEL = jax.random.normal(KEYS[1], (4, 6))
BIAS = jnp.linspace(-1, 1, 6)


def oracle(x):
  """SiLU of numpy.convolve of one document, channel by channel."""
  columns = [np.convolve(x[:, d], KERNEL[::-1, d])[: len(x)] + BIAS[d] for d in range(x.shape[1])]
  sums = np.stack(columns, axis=1)
  return sums / (1 + np.exp(-sums))


def test_each_document_is_convolved_by_itself():
  y = conv1d(X, KERNEL, BIAS, packed_context(5, 2, 8, batch=2).segment_ids)
  for row in range(2):
    parts = [oracle(np.asarray(X[row, a:b])) for a, b in ((0, 5), (5, 7), (7, 15))]
    np.testing.assert_allclose(y[row], np.concatenate(parts), rtol=1e-5, atol=1e-5)


def test_a_document_can_be_continued_from_its_last_inputs():
  ones = jnp.ones((2, 15), jnp.int32)
  whole = conv1d(X, KERNEL, None, ones)
  rest = conv1d(X[:, 9:], KERNEL, None, ones[:, 9:], X[:, 6:9])
  np.testing.assert_allclose(rest, whole[:, 9:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [BIAS, None], ids=["bias", "no_bias"])
def test_gradients_are_those_of_a_matrix_over_time(bias):
  segments = packed_context(5, 2, 6, -2, batch=2).segment_ids
  before = np.arange(15)[:, None] - np.arange(15)  # [t, s]: s is so many tokens before t
  is_same = segments[:, :, None] == segments[:, None]

  def by_matrix(x, kernel, bias):
    taps = jnp.where(((before >= 0) & (before < 4))[..., None], kernel[np.clip(3 - before, 0, 3)], 0)
    sums = jnp.einsum("bts,tsd,bsd->btd", is_same, taps, x)
    return jax.nn.silu(sums if bias is None else sums + bias)

  loss = lambda function: jax.grad(lambda *inputs: jnp.sum(jnp.sin(function(*inputs))), argnums=(0, 1, 2))
  ours = loss(lambda *inputs: conv1d(*inputs, segments))(X, KERNEL, bias)
  for mine, exact in zip(jax.tree.leaves(ours), jax.tree.leaves(loss(by_matrix)(X, KERNEL, bias)), strict=True):
    np.testing.assert_allclose(mine, exact, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_worked_out_in_float32():
  x, segments = X.astype(jnp.bfloat16), packed_context(5, 2, 8, batch=2).segment_ids
  exact = conv1d(x.astype(jnp.float32), KERNEL, BIAS, segments)
  y = conv1d(x, KERNEL, BIAS, segments)
  assert y.dtype == jnp.bfloat16
  # Rounded twice: the sums that SiLU is taken of, and its results.
  np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-7, atol=2**-8)
