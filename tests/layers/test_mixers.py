"""What every layer letter promises, whatever it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import packed_context, tiny_model
from ultrathink_jax.models.layer import MIXERS, Layer

LETTERS = sorted(MIXERS)
T = 24


def layer(letter, context, **changes):
  """Returns (x -> output) of one layer with weights large enough that every path matters, and an input."""
  module = Layer(letter, tiny_model(**changes))
  x = jax.random.normal(jax.random.key(1), (*context.positions.shape, 32))
  variables = jax.jit(module.init)(jax.random.key(0), x, context, None)
  variables = jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 1 else leaf, variables)
  return jax.jit(lambda x: module.apply(variables, x, context, None)[0]), x


@pytest.mark.parametrize("letter", LETTERS)
def test_no_output_has_a_gradient_from_a_later_token(letter):
  forward, x = layer(letter, packed_context(T))
  jacobian = jax.jit(jax.jacrev(lambda x: forward(x).sum(axis=(0, 2))))(x)  # [T out, 1, T in, D]
  influence = np.abs(jacobian[:, 0]).max(axis=-1)
  assert np.all(influence[np.triu_indices(T, 1)] == 0)
  assert np.all(np.diag(influence) > 0)


@pytest.mark.parametrize("letter", LETTERS)
def test_a_change_in_one_document_leaves_the_others_bitwise_as_they_were(letter):
  context = packed_context(7, 10, 4, -3)
  forward, x = layer(letter, context)
  changed = x.at[:, 7:17].set(5 * jax.random.normal(jax.random.key(2), (1, 10, 32)))
  before, after = forward(x), forward(changed)
  others = np.asarray(context.segment_ids[0]) != 2
  np.testing.assert_array_equal(before[:, others], after[:, others])
  assert float(jnp.abs(before - after).max()) > 0.1


@pytest.mark.parametrize("letter", LETTERS)
def test_packed_documents_equal_separate_ones(letter):
  forward, x = layer(letter, packed_context(7, 10, 7))
  packed = forward(x)
  for start, end in ((0, 7), (7, 17), (17, 24)):
    alone, _ = layer(letter, packed_context(end - start))
    np.testing.assert_allclose(packed[:, start:end], alone(x[:, start:end]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("batch", [2, 7])
def test_rows_of_a_batch_do_not_depend_on_each_other(letter, batch):
  forward, x = layer(letter, packed_context(9, batch=batch))
  alone, _ = layer(letter, packed_context(9))
  together = forward(x)
  for row in range(batch):
    np.testing.assert_allclose(together[row], alone(x[row : row + 1])[0], rtol=1e-5, atol=1e-5)


def test_a_window_layer_sees_its_window_and_no_more():
  forward, x = layer("L", packed_context(T), window_tokens=5)
  jacobian = jax.jit(jax.jacrev(lambda x: forward(x).sum(axis=(0, 2))))(x)
  influence = np.abs(jacobian[:, 0]).max(axis=-1) > 0
  distance = np.arange(T)[:, None] - np.arange(T)
  np.testing.assert_array_equal(influence, (distance >= 0) & (distance < 5))


def test_attention_does_not_depend_on_the_absolute_position():
  context = packed_context(T)
  shifted = context._replace(positions=context.positions + 100)
  (forward, x), (forward_shifted, _) = layer("A", context), layer("A", shifted)
  np.testing.assert_allclose(forward(x), forward_shifted(x), rtol=1e-4, atol=1e-4)


def test_qk_norm_bounds_attention_scores():
  plain, x = layer("A", packed_context(T))
  normed, _ = layer("A", packed_context(T), qk_norm="head")
  np.testing.assert_allclose(normed(x) - x, normed(100 * x) - 100 * x, rtol=1e-2, atol=1e-2)
  assert float(jnp.abs(plain(x) - normed(x)).max()) > 0.1
