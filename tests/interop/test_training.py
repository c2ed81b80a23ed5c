"""Imported models train as they do in torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.interop.conftest import load_fixture
from ultrathink_jax.models.language_model import LanguageModel, logits, single_documents

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STEPS = 20
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY = 3e-3, (0.9, 0.95), 1e-8, 0.1
NAMES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmoe", "mamba2", "bamba", "granitemoehybrid")
NAMES += ("granitemoehybrid_dense", "nemotron_h", "nemotron_h_dense")


def batches(vocab_size: int) -> np.ndarray:
  """Returns tokens [STEPS, 4, 33] that count on by a step of their own, so that there is something to learn."""
  generator = np.random.default_rng(0)
  start, step = generator.integers(0, vocab_size, (2, STEPS, 4, 1))
  return (start + (step % 5 + 1) * np.arange(33)) % vocab_size


def losses_of_torch(fixture) -> list[float]:
  model = transformers.AutoModelForCausalLM.from_pretrained(
    fixture.directory, dtype=torch.float32, attn_implementation="eager"
  ).train()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY
  )
  losses = []
  for tokens in batches(fixture.model.vocab_size):
    tokens = torch.from_numpy(tokens)
    predicted = model(tokens[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
  return losses


def losses_of_jax(fixture) -> list[float]:
  model = dataclasses.replace(fixture.model, capacity_factor=0.0)
  optimizer = optax.adamw(LEARNING_RATE, *BETAS, EPSILON, weight_decay=WEIGHT_DECAY)
  # The bias on the choice of experts is no parameter there.
  is_frozen = lambda path: path[-1].key == "router_bias"

  def loss_of(params, tokens):
    output = LanguageModel(model).apply({"params": params}, tokens[:, :-1], single_documents(tokens[:, :-1]))
    return optax.softmax_cross_entropy_with_integer_labels(logits(output), tokens[:, 1:]).mean()

  @jax.jit
  def step(params, state, tokens):
    loss, gradients = jax.value_and_grad(loss_of)(params, tokens)
    updates, state = optimizer.update(gradients, state, params)
    updates = jax.tree_util.tree_map_with_path(lambda path, u: jnp.zeros_like(u) if is_frozen(path) else u, updates)
    return optax.apply_updates(params, updates), state, loss

  params, state, losses = fixture.params, optimizer.init(fixture.params), []
  for tokens in batches(model.vocab_size):
    params, state, loss = step(params, state, tokens)
    losses.append(float(loss))
  return losses


@pytest.mark.parametrize("name", NAMES)
def test_an_imported_model_trains_with_the_loss_curve_of_torch(name):
  fixture = load_fixture(name)
  ours, theirs = losses_of_jax(fixture), losses_of_torch(fixture)
  assert theirs[-1] < 0.8 * theirs[0]
  np.testing.assert_allclose(ours, theirs, rtol=0.01)
