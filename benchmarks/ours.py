"""Our side of a measurement: the trainer's own step and the engine's own generation, on random tokens.

Nothing is built here that the product builds otherwise: recipe, plan, optimizer, layout, compiler options and donation
come from the functions that `--mode=train` calls, and decoding is `generate`, as in `--mode=generate`.
"""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.shapes import random_tokens
from ultrathink_jax.config import Config, GenerateConfig
from ultrathink_jax.generate.engine import generate
from ultrathink_jax.models.counts import count_model
from ultrathink_jax.models.language_model import init_params
from ultrathink_jax.parallel.devices import describe_devices, peak_memory_bytes
from ultrathink_jax.parallel.mesh import BATCH_AXES
from ultrathink_jax.recipes import find_recipe
from ultrathink_jax.train.plan import compile_step, make_plan
from ultrathink_jax.train.state import make_init
from ultrathink_jax.types import Batch, Context, Parameters, TrainState


def next_token_batch(tokens: np.ndarray) -> Batch:
  """Returns rows of one document each; the last token of a row has nothing to predict."""
  weights = np.ones(tokens.shape, np.float32)
  weights[:, -1] = 0
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  return Batch(tokens, np.roll(tokens, -1, axis=1), weights, Context(positions, np.ones_like(tokens)))


class OurTraining:
  """Calls are optimizer steps: forward, backward, clipping, AdamW, on donated state.

  `base` are the parameters to begin with, or those that an adapted run freezes; None: new ones.
  """

  def __init__(self, config: Config, base: Parameters | None = None):
    recipe = find_recipe(config)
    plan = make_plan(config, recipe, describe_devices())
    self.tokens_per_call = config.train.batch_size * config.train.sequence_length
    self.parameters = count_model(config.model).total
    with jax.set_mesh(plan.mesh):
      init = make_init(config, recipe, plan.optimizer)
      self._state, self._frozen = jax.jit(init, out_shardings=(plan.shardings, plan.frozen_shardings))(base)
      sharding = NamedSharding(plan.mesh, PartitionSpec(BATCH_AXES))
      self._batch = jax.device_put(next_token_batch(random_tokens(config)), sharding)
      jax.block_until_ready((self._state, self._batch))
      begun = time.perf_counter()
      self._step = compile_step(config, recipe, plan, self._state, self._frozen, self._batch)
      self.compile_seconds = time.perf_counter() - begun
    self(1)
    self.first_loss = self.loss

  def __call__(self, calls: int) -> float:
    """Returns the seconds that so many steps take."""
    begun = time.perf_counter()
    for _ in range(calls):
      self._state, self._sums = self._step(self._state, self._frozen, self._batch)
    jax.block_until_ready(self._state)
    return time.perf_counter() - begun

  @property
  def state(self) -> TrainState:
    """What the next step begins with; that step takes its memory."""
    return self._state

  @property
  def frozen_bytes(self) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self._frozen))

  @property
  def program_bytes(self) -> int:
    """What the compiled step holds at most: its arguments, in whose place the new state goes, and temporaries."""
    memory = self._step.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes

  @property
  def loss(self) -> float:
    """Nats per token at the last step."""
    return float(self._sums["loss/lm"]) / float(self._sums["weight"])

  @property
  def facts(self) -> dict[str, Any]:
    return {
      "tokens_per_call": self.tokens_per_call,
      "parameters": self.parameters,
      "first_loss": self.first_loss,
      "compile_seconds": self.compile_seconds,
      "peak_bytes": peak_memory_bytes(),
      "device": describe_devices().kind,
    }


class _TokensAsText:
  """A tokenizer whose texts are numbers with blanks between them, and whose documents never end."""

  bos_id, eos_id, fingerprint = 0, -1, ""

  def __init__(self, vocab_size: int):
    self.vocab_size = vocab_size

  def encode(self, text: str) -> list[int]:
    return [int(number) for number in text.split()]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    return ""

  def save(self, directory: Path) -> None:
    raise NotImplementedError("a stand-in for measurements is not saved")


GREEDY = GenerateConfig(1, 0.0, 0, 1.0, 1.0, (), 0)


class OurDecoding:
  """Calls are two generations, the longer by `new_tokens`; their difference is decoding alone."""

  def __init__(
    self,
    config: Config,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    first_tokens: int,
    sampling: GenerateConfig = GREEDY,
  ):
    self._sampling = sampling
    self._model = config.model
    self._tokenizer = _TokensAsText(config.model.vocab_size)
    self._params = jax.jit(lambda: init_params(config.model, jax.random.key(0)))()
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.model.vocab_size, (batch_size, prompt_tokens - 1))  # BOS comes before
    self._prompts = [" ".join(map(str, prompt)) for prompt in prompts]
    self._lengths = (first_tokens, first_tokens + new_tokens)
    self.tokens_per_call = batch_size * new_tokens
    self.parameters = count_model(config.model).total
    self(1)

  def generation_seconds(self, num_tokens: int) -> float:
    """Returns how long the prompts and `num_tokens` new tokens of each take."""
    sampling = dataclasses.replace(self._sampling, max_new_tokens=num_tokens)
    begun = time.perf_counter()
    generate(self._model, self._params, self._tokenizer, self._prompts, sampling)
    return time.perf_counter() - begun

  def __call__(self, calls: int) -> float:
    """Returns the seconds of the tokens between the two lengths."""
    short, long = self._lengths
    return sum(self.generation_seconds(long) - self.generation_seconds(short) for _ in range(calls))

  @property
  def facts(self) -> dict[str, Any]:
    return {"tokens_per_call": self.tokens_per_call, "parameters": self.parameters, "device": describe_devices().kind}
