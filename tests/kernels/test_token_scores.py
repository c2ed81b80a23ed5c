import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultrathink_jax.kernels import cross_entropy_chunked
from ultrathink_jax.kernels.token_scores import token_scores


@pytest.fixture
def arrays():
  keys = jax.random.split(jax.random.key(0), 3)
  hidden, table = jax.random.normal(keys[0], (2, 12, 8)), jax.random.normal(keys[1], (50, 8))
  return hidden, table, jax.random.randint(keys[2], (2, 12), 0, 50)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("max_logits", [2**25, 2 * 50 * 3])
def test_scores_are_those_of_all_logits_at_once(arrays, cap, max_logits, monkeypatch):
  monkeypatch.setattr(cross_entropy_chunked, "_MAX_CHUNK_LOGITS", max_logits)
  hidden, table, targets = (np.array(array) for array in arrays)
  logits = np.einsum("btd,vd->btv", hidden.astype(np.float64), table)
  logits = logits if cap is None else cap * np.tanh(logits / cap)
  of_targets = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  targets[0, 3] = logits[0, 3].argmax()
  of_targets[0, 3] = logits[0, 3].max()
  scores = token_scores(*arrays[:2], jnp.asarray(targets), cap)
  np.testing.assert_allclose(scores.nats, np.log(np.exp(logits).sum(-1)) - of_targets, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(scores.is_best, logits.argmax(-1) == targets)
  assert scores.is_best[0, 3]


def test_of_equal_logits_the_first_is_the_best():
  scores = token_scores(jnp.ones((1, 2, 4)), jnp.ones((6, 4)), jnp.array([[0, 5]]))
  np.testing.assert_array_equal(scores.is_best, [[True, False]])
  np.testing.assert_allclose(scores.nats, np.log(6), rtol=1e-6)


def test_long_rows_never_hold_all_logits(monkeypatch):
  monkeypatch.setattr(cross_entropy_chunked, "_MAX_CHUNK_LOGITS", 4 * 1000)
  shapes = (jax.ShapeDtypeStruct((1, 1024, 4), jnp.float32), jax.ShapeDtypeStruct((1000, 4), jnp.float32))
  targets = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
  compiled = jax.jit(lambda *args: token_scores(*args)).lower(*shapes, targets).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 1024 * 1000 * 4 / 8
