"""The decoder: embedding, groups of layers scanned over their periods, a final norm.

Letters: B batch  T length  D embed  V vocab  R repeats of a period.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.kernels.materialize import materialized
from ultrathink_jax.kernels.matmul import in_two_rows
from ultrathink_jax.kernels.soft_cap import soft_cap
from ultrathink_jax.layers.linear import ADAPTERS, QUANTIZED, Embedding, Unembedding
from ultrathink_jax.layers.norm import RMSNorm
from ultrathink_jax.layers.rope import rotation
from ultrathink_jax.models.components import component
from ultrathink_jax.models.layer import MIXERS, groups, layer_names
from ultrathink_jax.models.matrices import is_matrix
from ultrathink_jax.models.stack import gathered_ahead, gathers_ahead, pipelined, rounds_of, scanned
from ultrathink_jax.parallel.mesh import axis_size, without_mesh
from ultrathink_jax.parallel.sharding import constrain
from ultrathink_jax.types import Adapted, Adapter, Context, Output, Parameters


class LanguageModel(nn.Module):
  """Stateless: parameters, caches and context come in, an Output comes out.

  Parameters of group g are stacked over its repeats under `group_g`; see `interop/pretrained.py` for the unstacked
  names that files use.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, tokens: Int[Array, "B T"], context: Context, cache: Any = None) -> Output:
    config = self.config
    scale = 0.02 if config.tie_embeddings else 1.0
    table = Embedding(config.vocab_size, config.embed_dim, scale, name="embedding")()
    x = jnp.take(constrain(table, (None, None)), tokens, axis=0).astype(config.dtype)
    if config.embedding_multiplier != 1:
      x *= config.embedding_multiplier
    x = constrain(x, ("batch", "length", None))
    unembedding = table
    if not config.tie_embeddings:
      unembedding = Unembedding(config.vocab_size, config.embed_dim, name="unembedding")()
    if config.position == "rope":  # once for all layers
      turn = materialized(lambda positions: rotation(positions, config.head_dim, config.rope), context.positions)
      context = context._replace(rotation=turn)
    new_cache, aux, taps = {}, {}, {}
    if axis_size("pipe") > 1 and cache is None:
      x, aux = self._pass_through_stages(x, context)
    else:
      for index, group in enumerate(groups(config)):
        name = f"group_{index}"
        if cache is None and not self.is_initializing() and gathers_ahead(group, config):
          key = None if context.router_noise is None else self.make_rng("router")
          x, group_aux = gathered_ahead(group, config, self.variables["params"][name], x, context, key)
          group_taps = {}
        else:
          stack = scanned(group, config, is_recomputed=config.remat != "none" and cache is None, name=name)
          x, (new_cache[name], group_aux, group_taps) = stack(x, None if cache is None else cache[name], context)
        x = constrain(x, ("batch", "length", None))
        aux |= {f"{name}/{layer}": values for layer, values in group_aux.items()}
        taps |= {f"{name}/{layer}": tap for layer, tap in group_taps.items()}
    hidden = RMSNorm(config.norm_epsilon, name="final_norm")(x)
    if config.logits_multiplier != 1:
      hidden *= config.logits_multiplier
    cap = config.logits_soft_cap or None
    return Output(hidden, unembedding, cap, None if cache is None else new_cache, aux, taps)

  def _pass_through_stages(self, x: Float[Array, "B T D"], context: Context) -> tuple[Array, dict[str, Any]]:
    """Returns x after all groups and their aux values; there are no taps in a pipeline."""
    all_groups, aux = groups(self.config), {}
    for numbers in rounds_of(all_groups):
      variables = [self._variables_of(f"group_{number}") for number in numbers]
      key = None if context.router_noise is None else self.make_rng("router")
      x, of_rounds = pipelined(all_groups[numbers[0]], self.config, variables, x, context, key)
      x = constrain(x, ("batch", "length", None))
      for number, values in zip(numbers, of_rounds, strict=True):
        aux |= {f"group_{number}/{layer}": value for layer, value in values.items()}
    return x, aux

  def _variables_of(self, group: str) -> dict[str, Any]:
    return {name: tree[group] for name, tree in self.variables.items() if group in tree}


def variables(params: Parameters | Adapted) -> dict[str, Any]:
  """Returns what `LanguageModel.apply` takes."""
  if not isinstance(params, Adapted):
    return {"params": params}
  return {"params": params.params, QUANTIZED: params.quantized, ADAPTERS: params.lora}


def inference_config(config: ModelConfig) -> ModelConfig:
  """Returns the model as it runs outside training: every token reaches all its experts, nothing is recomputed."""
  backend = "auto" if config.experts_backend == "capacity" else config.experts_backend
  enough = float(config.num_experts)  # no expert axis is longer, so that no row can be one too many
  return dataclasses.replace(
    config, capacity_factor=0.0, expert_buffer_factor=enough, experts_backend=backend, remat="none"
  )


def in_compute_dtype(config: ModelConfig, params: Parameters | Adapted) -> Parameters | Adapted:
  """Returns parameters that give the same outputs: what layers round to the compute dtype is rounded once and for all.

  Routers compute in float32, and so do norms, convolutions and what else is small. An adapter with a magnitude reads
  the matrices it adapts in float32: with one, nothing is rounded.
  """
  if isinstance(params, Adapted):
    adapters = jax.tree.leaves(params.lora, is_leaf=lambda leaf: isinstance(leaf, Adapter))
    has_magnitude = any(adapter.magnitude is not None for adapter in adapters)
    return params if has_magnitude else params._replace(params=in_compute_dtype(config, params.params))

  def rounded(path: tuple[Any, ...], leaf: Array) -> Array:
    part = component(path)
    return leaf.astype(config.dtype) if part == "embedding" or (is_matrix(path) and part != "router") else leaf

  return jax.tree_util.tree_map_with_path(rounded, params)


def init_cache(config: ModelConfig, batch_size: int, length: int) -> Any:
  """Returns empty caches for `batch_size` documents of up to `length` tokens, stacked like the parameters."""
  dtype = jnp.dtype(config.dtype)
  cache = {}
  for index, group in enumerate(groups(config)):
    period = {
      name: MIXERS[letter].init_cache(config, batch_size, length, dtype)
      for name, letter in zip(layer_names(group.letters), group.letters, strict=True)
    }
    stack = lambda array, repeats=group.repeats: jnp.broadcast_to(array, (repeats, *array.shape))
    cache[f"group_{index}"] = jax.tree.map(stack, period)
  return cache


def single_documents(tokens: Int[Array, "B T"]) -> Context:
  """Returns the context of rows that hold one whole document each."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  return Context(positions, jnp.ones_like(positions))


def init_params(config: ModelConfig, key: Key[Array, ""]) -> Parameters:
  """Returns fresh float32 parameters."""
  return nn.meta.unbox(_init_boxed(config, key))


def parameter_shapes(config: ModelConfig) -> Parameters:
  """Returns the shapes of `init_params`; allocates nothing."""
  return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def parameter_axes(config: ModelConfig) -> Any:
  """Returns the logical axis names of every parameter, a tuple per leaf; allocates nothing."""
  boxed = jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))
  is_boxed = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
  return jax.tree.map(lambda leaf: tuple(leaf.names), boxed, is_leaf=is_boxed)


def _init_boxed(config: ModelConfig, key: Key[Array, ""]) -> Any:
  tokens = jnp.zeros((1, 8), jnp.int32)
  # The same numbers come from a loop over periods, which compiles in a quarter of the time.
  config = dataclasses.replace(config, unroll=1)
  with without_mesh():  # over which so small a batch does not divide
    return LanguageModel(config).init(key, tokens, single_documents(tokens))["params"]


def logits(output: Output) -> Array:
  """Returns float32 [B, T, V]; for prompts and tests, training never holds them."""
  table = output.unembedding.astype(output.hidden.dtype)
  project = lambda rows: jnp.einsum("td,vd->tv", rows, table, preferred_element_type=jnp.float32)
  *outer, D = output.hidden.shape
  scores = in_two_rows(project, output.hidden.reshape(-1, D))
  return soft_cap(scores.reshape(*outer, -1), output.soft_cap)
