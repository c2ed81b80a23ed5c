import jax
import jax.numpy as jnp
import numpy as np

from tests.conftest import packed_context
from ultrathink_jax.kernels.conv1d import conv1d

KEYS = jax.random.split(jax.random.key(0))
X = jax.random.normal(KEYS[0], (2, 15, 6))
KERNEL = jax.random.normal(KEYS[1], (4, 6))


def oracle(x):
  """numpy.convolve of one document, channel by channel."""
  columns = [np.convolve(x[:, d], KERNEL[::-1, d])[: len(x)] for d in range(x.shape[1])]
  return np.stack(columns, axis=1)


def test_each_document_is_convolved_by_itself():
  y = conv1d(X, KERNEL, packed_context(5, 2, 8, batch=2).segment_ids)
  for row in range(2):
    parts = [oracle(np.asarray(X[row, a:b])) for a, b in ((0, 5), (5, 7), (7, 15))]
    np.testing.assert_allclose(y[row], np.concatenate(parts), rtol=1e-5, atol=1e-5)


def test_a_document_can_be_continued_from_its_last_inputs():
  ones = jnp.ones((2, 15), jnp.int32)
  whole = conv1d(X, KERNEL, ones)
  rest = conv1d(X[:, 9:], KERNEL, ones[:, 9:], X[:, 6:9])
  np.testing.assert_allclose(rest, whole[:, 9:], rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_a_matrix_over_time():
  segments = packed_context(5, 2, 6, -2, batch=2).segment_ids
  before = np.arange(15)[:, None] - np.arange(15)  # [t, s]: s is so many tokens before t
  is_same = segments[:, :, None] == segments[:, None]

  def by_matrix(x, kernel):
    taps = jnp.where(((before >= 0) & (before < 4))[..., None], kernel[np.clip(3 - before, 0, 3)], 0)
    return jnp.einsum("bts,tsd,bsd->btd", is_same, taps, x)

  loss = lambda function: jax.grad(lambda *arrays: jnp.sum(jnp.sin(function(*arrays))), argnums=(0, 1))(X, KERNEL)
  for ours, exact in zip(loss(lambda x, k: conv1d(x, k, segments)), loss(by_matrix), strict=True):
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)
