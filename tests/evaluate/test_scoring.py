import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import tiny_model
from ultrathink_jax.data.loader import validation_batches
from ultrathink_jax.data.packing import Example
from ultrathink_jax.data.tokenizer import NumbersTokenizer
from ultrathink_jax.evaluate.documents import with_ends
from ultrathink_jax.evaluate.perplexity import evaluate, make_sum_of_losses
from ultrathink_jax.evaluate.scoring import make_score, score_all
from ultrathink_jax.evaluate.windows import Scored, windows
from ultrathink_jax.models.language_model import LanguageModel, init_params, logits, single_documents

MODEL = tiny_model(layers="AE")
LENGTHS = (17, 40, 90)
SIZE = 32


class Source:
  name, lengths = "source", np.array([20, 9, 25])

  def example(self, index):
    tokens = np.random.default_rng(index).integers(2, 64, self.lengths[index]).astype(np.int32)
    return Example(tokens, np.arange(len(tokens)) >= 4)


@pytest.fixture(scope="module")
def params():
  return jax.jit(lambda: init_params(MODEL, jax.random.key(0)))()


@pytest.fixture(scope="module")
def score():
  return make_score(MODEL)


@pytest.fixture(scope="module")
def sequences():
  random = np.random.default_rng(0)
  counts = [np.arange(length) > 0 for length in LENGTHS]
  counts[1][:11] = False
  return [Scored(random.integers(0, 64, len(c)).astype(np.int32), c) for c in counts]


def test_scores_are_those_of_each_window_by_itself(params, score, sequences):
  apply = lambda tokens: LanguageModel(MODEL).apply({"params": params}, tokens, single_documents(tokens))
  all_logits = jax.jit(lambda tokens: logits(apply(tokens)))
  [found] = score_all(score, [params], sequences, SIZE, 3)
  for number, (tokens, counts) in enumerate(sequences):
    nats = correct = 0
    for window in windows(number, len(tokens) - 1, SIZE):
      inputs = jnp.asarray(tokens[None, window.start : window.stop])
      of_window = np.asarray(all_logits(inputs))[0]
      for at in range(window.first, window.stop):
        if counts[at + 1]:
          row, target = of_window[at - window.start].astype(np.float64), tokens[at + 1]
          nats += np.log(np.exp(row).sum()) - row[target]
          correct += row.argmax() == target
    assert found.nats[number] == pytest.approx(nats, rel=1e-5)
    assert found.correct[number] == correct
    assert found.targets[number] == counts.sum()


def test_loads_count_the_choices_of_every_token_that_was_read(params, score, sequences):
  [found] = score_all(score, [params], sequences, 96, 3)
  [(path, load)] = found.loads.items()
  assert path == "group_0/moe_1"
  assert load.shape == (1, 4)
  assert load.sum() == MODEL.experts_per_token * sum(length - 1 for length in LENGTHS)


def test_each_of_several_parameters_is_scored_as_if_alone(params, score, sequences):
  other = jax.tree.map(lambda leaf: 1.1 * leaf, params)
  both = score_all(score, [params, other], sequences, SIZE, 3)
  [alone] = score_all(score, [other], sequences, SIZE, 3)
  np.testing.assert_array_equal(both[1].nats, alone.nats)
  assert not np.allclose(both[0].nats, both[1].nats)


def test_whole_documents_score_what_evaluation_of_the_split_does(params, score):
  source = Source()
  batches = validation_batches(source, NumbersTokenizer(64), 1, 64)
  expected = evaluate(make_sum_of_losses(MODEL), params, batches, 1.0)
  sequences = [with_ends(source.example(index), 0, 1) for index in range(3)]
  [found] = score_all(score, [params], sequences, 64, 2)
  assert found.targets.sum() == expected.targets
  assert found.nats.sum() / found.targets.sum() == pytest.approx(expected.loss, rel=1e-5)
