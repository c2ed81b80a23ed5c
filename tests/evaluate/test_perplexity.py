import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import packed_context, tiny_model
from ultrathink_jax.evaluate.perplexity import evaluate, make_sum_of_losses
from ultrathink_jax.models.language_model import LanguageModel, init_params, logits
from ultrathink_jax.types import Batch


def test_the_evaluation_is_the_mean_negative_log_likelihood_over_all_batches():
  model = tiny_model(layers="AE")
  params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
  tokens = jax.random.randint(jax.random.key(1), (3, 2, 10), 0, 64)
  weights = jnp.ones((3, 2, 10)).at[2, 1].set(0)
  batches = [
    Batch(row, jnp.roll(row, -1, 1), w, packed_context(10, batch=2)) for row, w in zip(tokens, weights, strict=True)
  ]
  nats = 0.0
  for batch in batches:
    output = LanguageModel(model).apply({"params": params}, batch.tokens, batch.context)
    likelihood = jax.nn.log_softmax(logits(output))
    nats -= float(jnp.sum(batch.weights * jnp.take_along_axis(likelihood, batch.targets[..., None], -1)[..., 0]))
  result = evaluate(make_sum_of_losses(model), params, batches, bytes_per_target=4.0)
  assert result.targets == 50
  assert result.loss == pytest.approx(nats / 50, rel=1e-5)
  assert result.perplexity == pytest.approx(np.exp(nats / 50), rel=1e-5)
  assert result.bits_per_byte == pytest.approx(nats / np.log(2) / 200, rel=1e-5)


def test_evaluation_drops_no_token_whatever_the_training_capacity():
  params = jax.jit(lambda: init_params(tiny_model(layers="E"), jax.random.key(0)))()
  tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, 64)
  batch = Batch(tokens, tokens, jnp.ones((2, 32)), packed_context(32, batch=2))
  tight = make_sum_of_losses(tiny_model(layers="E", capacity_factor=0.25))(params, batch)
  loose = make_sum_of_losses(tiny_model(layers="E"))(params, batch)
  np.testing.assert_array_equal(tight[0], loose[0])
