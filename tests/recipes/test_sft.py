"""Instruction tuning: only what follows a prompt is learned, however documents lie in rows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import tiny_config
from ultrathink_jax.data.loader import training_loader
from ultrathink_jax.data.prepare import prepare
from ultrathink_jax.errors import DataError
from ultrathink_jax.models.language_model import init_params
from ultrathink_jax.recipes import find_recipe
from ultrathink_jax.types import Batch, Context

PAIRS = [(f"What is {n} and {n}?", f" {2 * n}, of course." * (n % 3 + 1)) for n in range(40)]


def config_of(path, packing="best_fit", **loss):
  data = {"source": f"jsonl:{path}", "tokenizer": "bytes", "packing": packing, "shuffle": False, "workers": 1}
  data["validation_fraction"] = 0.0
  model = {"layers": "AF", "vocab_size": 260}
  config = tiny_config(data=data, model=model, train={"batch_size": 4, "sequence_length": 96}, loss=loss)
  return dataclasses.replace(config, recipe="sft")


def read(config, folder):
  return prepare(config.data, config.model.vocab_size, folder, lambda line: None)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  path = tmp_path_factory.mktemp("sft") / "pairs.jsonl"
  path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in PAIRS))
  return path


@pytest.fixture(scope="module")
def params(pairs):
  return jax.jit(lambda: init_params(config_of(pairs).model, jax.random.key(0)))()


def loss_of(config, params, batch):
  recipe = find_recipe(config)
  of = jax.jit(lambda params, batch: recipe.loss(params, None, batch, jnp.int32(0), jax.random.key(0)))
  total, info = of(params, batch)
  return float(total), float(info.weight)


def test_only_completions_carry_loss(pairs, params, tmp_path):
  config = config_of(pairs)
  batch = next(training_loader(config, read(config, tmp_path)).batches(0))
  is_prompt = (batch.weights == 0) & (batch.context.segment_ids != 0)
  assert is_prompt.any()
  assert batch.weights.any()
  before, weight = loss_of(config, params, batch)
  assert weight == batch.weights.sum()
  of_prompts = batch._replace(targets=np.where(is_prompt, (batch.targets + 1) % 256, batch.targets))
  assert loss_of(config, params, of_prompts)[0] == before
  place = tuple(np.argwhere(batch.weights > 0)[3])
  of_completions = batch.targets.copy()
  of_completions[place] = (of_completions[place] + 1) % 256
  assert loss_of(config, params, batch._replace(targets=of_completions))[0] != before
  learned = bytes((batch.targets[0][batch.weights[0] > 0] % 256).tolist()).decode(errors="replace")
  assert "of course." in learned
  assert "What is" not in learned


def test_prompts_count_by_their_weight(pairs, params, tmp_path):
  config = config_of(pairs)
  batch = next(training_loader(config, read(config, tmp_path)).batches(0))
  total, weight = loss_of(config, params, batch)
  whole = batch._replace(weights=(batch.context.segment_ids != 0).astype(np.float32))
  of_all, all_weight = loss_of(config, params, whole)
  half, half_weight = loss_of(config_of(pairs, prompt_weight=0.5), params, batch)
  np.testing.assert_allclose(half, (total + of_all) / 2, rtol=1e-5)
  np.testing.assert_allclose(half_weight, (weight + all_weight) / 2, rtol=1e-6)


def test_packing_changes_nothing(pairs, params, tmp_path):
  config = config_of(pairs)
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=1))
  prepared = read(config, tmp_path)
  loader = training_loader(config, prepared)
  batches, total, weight = loader.batches(0), 0.0, 0.0
  for _ in range(loader.rows_per_epoch):
    parts = loss_of(config, params, next(batches))
    total, weight = total + parts[0], weight + parts[1]
  assert loader.rows_per_epoch < len(PAIRS)
  store, tokenizer = prepared.train[0], prepared.tokenizer
  alone, count = 0.0, 0.0
  for index in range(len(store)):
    example = store.example(index)
    row = np.zeros((1, 96), np.int32)
    tokens = np.concatenate([[tokenizer.bos_id], example.tokens, [tokenizer.eos_id]])
    row[0, : len(tokens)] = tokens
    weights = np.zeros((1, 96), np.float32)
    weights[0, : len(tokens) - 1] = [*example.is_learned, True]
    segments = (np.arange(96) < len(tokens) - 1).astype(np.int32)[None]
    context = Context(np.arange(96, dtype=np.int32)[None], segments)
    part = loss_of(config, params, Batch(row, np.roll(row, -1, axis=1), weights, context))
    alone, count = alone + part[0], count + part[1]
  assert weight == count
  np.testing.assert_allclose(total, alone, rtol=1e-5)


def test_text_without_prompts_is_refused(tmp_path):
  path = tmp_path / "texts.jsonl"
  path.write_text("".join(json.dumps({"text": f"some text {n}"}) + "\n" for n in range(20)))
  config = config_of(path)
  with pytest.raises(DataError, match="no prompts"):
    find_recipe(config).source(read(config, tmp_path), [0, 1, 2, 3])
