"""Batched generation: prompts are read once into caches, then tokens are decoded a few at a time on the device.

Letters: B batch  T padded prompt length  V vocab.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ultrathink_jax import patterns
from ultrathink_jax.config import GenerateConfig, ModelConfig
from ultrathink_jax.data.tokenizer import Tokenizer
from ultrathink_jax.generate.sampling import Sampling, sample
from ultrathink_jax.lora.merging import with_merged_banks
from ultrathink_jax.models.language_model import (
  LanguageModel,
  in_compute_dtype,
  inference_config,
  init_cache,
  logits,
  variables,
)
from ultrathink_jax.models.layer import groups, layer_paths
from ultrathink_jax.parallel.devices import scan_unroll
from ultrathink_jax.types import Adapted, Context, Output, Parameters

_TOKENS_PER_CALL = 16  # decoded between two looks at the stop conditions
_LENGTH_STEP = 64  # prompts and caches are rounded up to multiples of this, so that few shapes are compiled


class _State(NamedTuple):
  """What decoding carries from token to token."""

  cache: Any
  logits: Float[Array, "B V"]  # of the next token
  length: Int[Array, " B"]  # tokens of the document so far
  num_new: Int[Array, ""]
  is_done: Bool[Array, " B"]
  seen: Bool[Array, "B V"]


def generate(
  model: ModelConfig, params: Parameters, tokenizer: Tokenizer, prompts: Sequence[str], config: GenerateConfig
) -> list[str]:
  """Returns a completion for each prompt, without the prompt, cut before an end of sequence or a stop string.

  A completion depends on its prompt, its place in the list and the seed, not on the other prompts.
  """
  if not prompts:
    return []
  model = inference_config(model)
  if isinstance(params, Adapted):
    params = with_merged_banks(params)
  params = _in_compute_dtype(model, params)
  if scan_unroll(2) == 2:
    # Where scans are unrolled, every token would copy the layer's weights out of the stack before it reads them.
    params = _write_out(model, params)
    model = dataclasses.replace(model, layers=patterns.spell(groups(model)))
  encoded = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
  lengths = np.array([len(tokens) for tokens in encoded], np.int32)
  longest = int(lengths.max())
  tokens = np.zeros((len(prompts), _round_up(longest)), np.int32)
  for row, prompt_tokens in zip(tokens, encoded, strict=True):
    row[: len(prompt_tokens)] = prompt_tokens
  sampling = Sampling(
    config.temperature == 0, config.temperature, config.top_k, config.top_p, config.repetition_penalty
  )
  keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(config.seed)))(jnp.arange(len(prompts)))
  state = _prefill(model, _round_up(longest + config.max_new_tokens), params, tokens, lengths)
  produced: list[list[int]] = [[] for _ in prompts]
  texts, is_done = [""] * len(prompts), np.zeros(len(prompts), bool)
  for _ in range(0, config.max_new_tokens, _TOKENS_PER_CALL):
    state, new_tokens = _decode(model, params, state, keys, sampling, tokenizer.eos_id)
    for row, row_tokens in enumerate(np.asarray(new_tokens)):
      if not is_done[row]:
        produced[row].extend(int(token) for token in row_tokens)
        texts[row], is_done[row] = _finish(tokenizer, produced[row][: config.max_new_tokens], config.stop)
    if is_done.all():
      break
    state = state._replace(is_done=jnp.asarray(is_done))
  return texts


_in_compute_dtype = jax.jit(in_compute_dtype, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def _write_out(model: ModelConfig, params: Parameters) -> Parameters:
  """Returns the parameters of the same layers as one period: those of each layer are arrays of their own."""
  if isinstance(params, Adapted):
    return Adapted(*(_write_out(model, tree) for tree in params))
  layers = {}
  for number, path, repeat in layer_paths(model):
    group, name = path.split("/")
    if name in params.get(group, {}):
      of_layer = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat : repeat + 1], params[group][name])
      layers[f"{name.rsplit('_', 1)[0]}_{number}"] = of_layer
  outside = {name: tree for name, tree in params.items() if not name.startswith("group_")}
  return outside | ({"group_0": layers} if layers else {})


def _round_up(length: int) -> int:
  return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def _finish(tokenizer: Tokenizer, tokens: list[int], stop: tuple[str, ...]) -> tuple[str, bool]:
  """Returns the text so far, cut at the earliest end, and whether it has ended."""
  is_done = tokenizer.eos_id in tokens
  text = tokenizer.decode(tokens[: tokens.index(tokenizer.eos_id)] if is_done else tokens)
  ends = [text.index(ending) for ending in stop if ending in text]
  return (text[: min(ends)], True) if ends else (text, is_done)


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(
  model: ModelConfig, cache_length: int, params: Parameters, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
) -> _State:
  B, T = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
  is_token = positions < lengths[:, None]
  context = Context(positions, is_token.astype(jnp.int32))
  output = LanguageModel(model).apply(variables(params), tokens, context, init_cache(model, B, cache_length))
  last = jnp.take_along_axis(output.hidden, lengths[:, None, None] - 1, axis=1)
  row = jnp.arange(B)[:, None]
  seen = jnp.zeros((B, model.vocab_size), bool).at[row, tokens].max(is_token)
  return _State(
    output.cache, _next_logits(output._replace(hidden=last)), lengths, jnp.int32(0), jnp.zeros(B, bool), seen
  )


def _next_logits(output: Output) -> Float[Array, "B V"]:
  return logits(output)[:, 0]


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=(2,))
def _decode(
  model: ModelConfig,
  params: Parameters,
  state: _State,
  keys: Key[Array, " B"],
  sampling: Sampling,
  eos_id: int,
) -> tuple[_State, Int[Array, "B _"]]:
  """Returns the state and tokens after a few more tokens; rows that are done stand still."""

  def one(state: _State, _: None) -> tuple[_State, Array]:
    step_keys = jax.vmap(lambda key: jax.random.fold_in(key, state.num_new))(keys)
    tokens = sample(step_keys, state.logits, state.seen, sampling).astype(jnp.int32)
    context = Context(state.length[:, None], jnp.where(state.is_done, 0, 1)[:, None])
    output = LanguageModel(model).apply(variables(params), tokens[:, None], context, state.cache)
    seen = state.seen.at[jnp.arange(tokens.size), tokens].set(True)
    return _State(
      output.cache,
      _next_logits(output),
      state.length + 1,
      state.num_new + 1,
      state.is_done | (tokens == eos_id),
      seen,
    ), tokens

  state, tokens = jax.lax.scan(one, state, length=_TOKENS_PER_CALL)
  return state, tokens.T
