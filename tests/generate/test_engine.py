import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import tiny_model
from ultrathink_jax.config import GenerateConfig
from ultrathink_jax.data.tokenizer import NumbersTokenizer
from ultrathink_jax.generate.engine import generate
from ultrathink_jax.models.language_model import LanguageModel, init_params, logits, single_documents

MODEL = tiny_model(layers="MAFEL")
TOKENIZER = NumbersTokenizer(MODEL.vocab_size)
GREEDY = GenerateConfig(24, 0.0, 0, 1.0, 1.0, (), 0)


@pytest.fixture(scope="module")
def params():
  """Weights far from uniform, so that greedy choices are clear."""
  params = jax.jit(lambda: init_params(MODEL, jax.random.key(0)))()
  return jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim > 1 else leaf, params)


def uncached(params, prompt, num_new):
  """Greedy decoding that runs the whole text anew for each token."""
  tokens = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt)]
  first = len(tokens)
  apply = jax.jit(lambda row: logits(LanguageModel(MODEL).apply({"params": params}, row, single_documents(row))))
  for _ in range(num_new):
    row = jnp.asarray(tokens + [0] * (64 - len(tokens)))[None]
    tokens.append(int(apply(row)[0, len(tokens) - 1].argmax()))
  new = tokens[first:]
  return TOKENIZER.decode(new[: new.index(TOKENIZER.eos_id)] if TOKENIZER.eos_id in new else new)


def test_cached_greedy_decoding_equals_uncached(params):
  prompts = ["5 9 33 2", "7", "", "12 " * 20 + "3"]
  completions = generate(MODEL, params, TOKENIZER, prompts, GREEDY)
  assert completions == [uncached(params, prompt, 24) for prompt in prompts]


def test_a_completion_does_not_depend_on_the_other_prompts(params):
  sampled = dataclasses.replace(GREEDY, temperature=1.0)
  together = generate(MODEL, params, TOKENIZER, ["5 9", "8 8 8 8 8 8 8"], sampled)
  assert together[0] == generate(MODEL, params, TOKENIZER, ["5 9"], sampled)[0]


def test_the_seed_decides_the_sample(params):
  sample = lambda seed: generate(
    MODEL, params, TOKENIZER, ["5"], dataclasses.replace(GREEDY, temperature=2.0, seed=seed)
  )
  assert sample(1) == sample(1)
  assert sample(1) != sample(2)


def test_a_stop_string_ends_the_completion_and_is_left_out(params):
  (full,) = generate(MODEL, params, TOKENIZER, ["5 9 33 2"], GREEDY)
  stop = full.split()[5]
  (stopped,) = generate(MODEL, params, TOKENIZER, ["5 9 33 2"], dataclasses.replace(GREEDY, stop=(stop,)))
  assert stopped == full[: full.index(stop)]


def test_no_more_tokens_than_asked_for(params):
  (completion,) = generate(MODEL, params, TOKENIZER, ["5"], dataclasses.replace(GREEDY, max_new_tokens=3))
  assert len(completion.split()) <= 3


def test_no_prompts_give_no_completions(params):
  assert generate(MODEL, params, TOKENIZER, [], GREEDY) == []
