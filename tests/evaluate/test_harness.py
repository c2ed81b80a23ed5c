"""What lm-eval-harness is told of a model. Needs lm_eval, but for the test of its absence."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import tiny_model
from ultrathink_jax.config import ModelConfig
from ultrathink_jax.data.tokenizer import BytesTokenizer, Tokenizer
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.evaluate.harness import run_tasks
from ultrathink_jax.evaluate.perplexity import evaluate, make_sum_of_losses
from ultrathink_jax.generate.engine import generate
from ultrathink_jax.models.language_model import LanguageModel, init_params, logits, single_documents
from ultrathink_jax.types import Batch

TASKS = Path(__file__).parent / "tasks"
WINDOW = 96
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


class Loaded(NamedTuple):
  config: ModelConfig
  params: Any
  tokenizer: Tokenizer


def request(*args):
  from lm_eval.api.instance import Instance

  return Instance("loglikelihood", {}, args, 0)


@pytest.fixture(scope="module")
def model():
  config = tiny_model(layers="AF", vocab_size=258)
  return Loaded(config, jax.jit(lambda: init_params(config, jax.random.key(0)))(), BytesTokenizer())


@pytest.fixture(scope="module")
def lm(model):
  from ultrathink_jax.evaluate.lm_eval_model import HarnessModel

  return HarnessModel(model, WINDOW, batch_size=4)


def likelihoods(model, text):
  """Returns the log-probability of every next byte after BOS, and whether it is the likeliest."""
  tokens = jnp.array([[model.tokenizer.bos_id, *model.tokenizer.encode(text)]])
  scores = logits(LanguageModel(model.config).apply({"params": model.params}, tokens, single_documents(tokens)))[0, :-1]
  scores, targets = np.asarray(scores, np.float64), np.asarray(tokens[0, 1:])
  of_targets = np.take_along_axis(scores, targets[:, None], -1)[:, 0]
  return of_targets - np.log(np.exp(scores).sum(-1)), scores.argmax(-1) == targets


def test_without_lm_eval_a_task_says_what_to_install(model, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match="pip install"):
    run_tasks(model, ["tiny_pages"], WINDOW, folder=TASKS)


@needs_lm_eval
def test_a_likelihood_is_the_sum_over_the_continuation_behind_bos(model, lm):
  [(likelihood, is_greedy), (whole, _)] = lm.loglikelihood([request("fn a", "(x)"), request("", "fn a(x)")])
  each, _ = likelihoods(model, "fn a(x)")
  assert likelihood == pytest.approx(each[4:].sum(), rel=1e-5)
  assert whole == pytest.approx(each.sum(), rel=1e-5)
  assert not is_greedy


@needs_lm_eval
def test_what_greedy_decoding_writes_is_greedy(model, lm):
  [text] = lm.generate_until([request("fn a", {"until": ["\n"], "max_gen_toks": 6})])
  [(_, is_greedy)] = lm.loglikelihood([request("fn a", text[:1])])
  assert text
  assert is_greedy == likelihoods(model, "fn a" + text[:1])[1][-1]


@needs_lm_eval
def test_rolling_likelihoods_agree_with_the_perplexity_of_the_same_text(model, lm):
  text = json.loads((TASKS / "tiny_pages.jsonl").read_text().splitlines()[0])["text"]
  [rolling] = lm.loglikelihood_rolling([request(text)])
  tokens = jnp.array([[model.tokenizer.bos_id, *model.tokenizer.encode(text)]])
  weights = jnp.ones((1, len(text)))
  batch = Batch(tokens[:, :-1], tokens[:, 1:], weights, single_documents(tokens[:, :-1]))
  ours = evaluate(make_sum_of_losses(model.config), model.params, [batch], 1.0)
  assert ours.targets == len(text)
  assert math.exp(-rolling / len(text)) == pytest.approx(ours.perplexity, rel=1e-4)


@needs_lm_eval
def test_settings_of_a_task_are_kept_or_refused(model, lm):
  prompts, settings = ["a", "bb", "ccc"], {"until": "x", "max_gen_toks": 5, "do_sample": True, "temperature": 0.7}
  texts = lm.generate_until([request(prompt, settings) for prompt in prompts])
  from ultrathink_jax.config import GenerateConfig

  sampling = GenerateConfig(5, 0.7, 0, 1.0, 1.0, ("x",), 0)
  assert texts == generate(model.config, model.params, model.tokenizer, prompts, sampling)
  with pytest.raises(ConfigError, match="num_beams"):
    lm.generate_until([request("a", {"num_beams": 4})])


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_tasks_of_a_folder_run_without_a_network(model, lm, monkeypatch):
  monkeypatch.chdir(TASKS.parents[2])
  found = run_tasks(model, ["tiny_pages", "tiny_choices", "tiny_completions"], WINDOW, batch_size=4, folder=TASKS)
  texts = [json.loads(line)["text"] for line in (TASKS / "tiny_pages.jsonl").read_text().splitlines()]
  rolling = lm.loglikelihood_rolling([request(text) for text in texts])
  num_bytes = sum(len(text.encode()) for text in texts)
  assert found["tiny_pages"]["bits_per_byte"] == pytest.approx(-sum(rolling) / num_bytes / math.log(2), rel=1e-4)
  assert 0 <= found["tiny_choices"]["acc"] <= 1
  assert found["tiny_completions"]["exact_match"] == 0
  with pytest.raises(ConfigError, match="tiny_page: not known"):
    run_tasks(model, ["tiny_page"], WINDOW, folder=TASKS)
