"""The Mamba-2 mixer: projections, a short causal convolution, selective state spaces, a gated norm.

Source: arXiv:2405.21060. The norm follows the gate and spans the inner width, or equal parts of it.
Letters: B batch  T length  D embed  N heads  K groups  P head dim  Z state size  W convolution width.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.backends import SSD, resolve_ssd
from ultrathink_jax.kernels.conv1d import conv1d
from ultrathink_jax.layers.linear import Projection
from ultrathink_jax.layers.norm import RMSNorm
from ultrathink_jax.types import Context

_DT_RANGE = (1e-3, 1e-1)
_DT_FLOOR = 1e-4
_A_RANGE = (1.0, 16.0)


@dataclasses.dataclass(frozen=True)
class MambaConfig:
  num_heads: int
  head_dim: int
  num_groups: int
  state_dim: int
  conv_width: int
  chunk_tokens: int
  norm_groups: int
  has_bias: bool
  has_conv_bias: bool
  dt_limits: tuple[float, float | None]
  backend: str
  norm_epsilon: float
  out_scale: float  # of the output projection's initial deviation

  @property
  def conv_dims(self) -> dict[str, int]:
    """Channels of the three convolved streams."""
    return {"x": self.num_heads * self.head_dim, "b": self._bc_dim, "c": self._bc_dim}

  @property
  def _bc_dim(self) -> int:
    return self.num_groups * self.state_dim


class MambaCache(NamedTuple):
  """The last W - 1 inputs of each convolution, oldest first, and the state of the recurrence (float32)."""

  conv: dict[str, Float[Array, "B W-1 _"]]
  state: Float[Array, "B N P Z"]


def init_cache(config: MambaConfig, batch_size: int, dtype: Any) -> MambaCache:
  """Returns the cache of documents not yet begun; its size does not depend on their length."""
  width = config.conv_width - 1
  conv = {name: jnp.zeros((batch_size, width, dim), dtype) for name, dim in config.conv_dims.items()}
  return MambaCache(conv, jnp.zeros((batch_size, config.num_heads, config.head_dim, config.state_dim), jnp.float32))


def init_dt_bias(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
  """Returns biases b such that softplus(b) is log-uniform in [0.001, 0.1]."""
  low, high = map(math.log, _DT_RANGE)
  dt = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), _DT_FLOOR)
  return dt + jnp.log(-jnp.expm1(-dt))


def init_a_log(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
  """Returns log(-A) for decay rates -A uniform in [1, 16]."""
  return jnp.log(jax.random.uniform(key, shape, dtype, *_A_RANGE))


class CausalConv(nn.Module):
  width: int
  axis: str
  has_bias: bool

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"], state: Float[Array, "B W D"] | None
  ) -> Float[Array, "B T D"]:
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=(), batch_axis=1)
    init = nn.with_logical_partitioning(uniform, (None, self.axis))
    kernel = self.param("kernel", init, (self.width, x.shape[-1]), jnp.float32)
    y = conv1d(x, kernel.astype(x.dtype), segment_ids, state)
    if self.has_bias:
      zeros = nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,))
      y += self.param("bias", zeros, x.shape[-1:], jnp.float32).astype(x.dtype)
    return jax.nn.silu(y)


class Mamba(nn.Module):
  config: MambaConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: MambaCache | None
  ) -> tuple[Float[Array, "B T D"], MambaCache | None, dict[str, Array]]:
    """Returns the mixed tokens; with a cache, they follow the cached document (one document a row, padding behind)."""
    config = self.config
    N, P, K, Z = config.num_heads, config.head_dim, config.num_groups, config.state_dim
    B, T, D = x.shape
    head_axes, group_axes = ("embed", "heads", "head_dim"), ("embed", None, "state")
    inward = lambda name, dims, axes: Projection(dims, axes, has_bias=config.has_bias, name=name)(x)
    gate = inward("gate", (N, P), head_axes)
    dt = inward("dt", (N,), ("embed", "heads")).astype(jnp.float32)
    streams = {
      "x": inward("x", (N, P), head_axes).reshape(B, T, N * P),
      "b": inward("b", (K, Z), group_axes).reshape(B, T, K * Z),
      "c": inward("c", (K, Z), group_axes).reshape(B, T, K * Z),
    }
    conv_axes = {"x": "heads", "b": "state", "c": "state"}
    mixed = {
      name: CausalConv(config.conv_width, conv_axes[name], config.has_conv_bias, name=f"conv_{name}")(
        stream, context.segment_ids, None if cache is None else cache.conv[name]
      )
      for name, stream in streams.items()
    }
    per_head = lambda name, init: self.param(name, nn.with_logical_partitioning(init, ("heads",)), (N,), jnp.float32)
    dt = jnp.clip(jax.nn.softplus(dt + per_head("dt_bias", init_dt_bias)), *config.dt_limits)
    dt = jnp.where(context.segment_ids[..., None] != 0, dt, 0)
    heads = mixed["x"].reshape(B, T, N, P)
    y, state = SSD[resolve_ssd(config.backend)](
      heads,
      dt,
      -jnp.exp(per_head("a_log", init_a_log)),
      mixed["b"].reshape(B, T, K, Z),
      mixed["c"].reshape(B, T, K, Z),
      context.segment_ids,
      None if cache is None else cache.state,
      config.chunk_tokens,
    )
    y += heads * per_head("d", nn.initializers.ones).astype(x.dtype)[:, None]
    norm = RMSNorm(config.norm_epsilon, ("heads", "head_dim"), config.norm_groups, name="norm")
    y = norm(y * jax.nn.silu(gate))
    y = Projection((D,), ("heads", "head_dim", "embed"), config.out_scale, config.has_bias, name="out")(y)
    if cache is not None:
      num_tokens = jnp.sum(context.segment_ids != 0, axis=1)
      conv = {name: _last_inputs(cache.conv[name], stream, num_tokens) for name, stream in streams.items()}
      cache = MambaCache(conv, state)
    return y, cache, {}


def _last_inputs(before: Float[Array, "B W D"], x: Float[Array, "B T D"], num_tokens: Int[Array, " B"]) -> Array:
  """Returns the last W inputs up to each row's last token, those of `before` included."""
  W = before.shape[1]
  joined = jnp.concatenate([before, x.astype(before.dtype)], axis=1)
  indices = num_tokens[:, None] + jnp.arange(W)
  return jnp.take_along_axis(joined, indices[..., None], axis=1)
