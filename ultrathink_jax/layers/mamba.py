"""The Mamba-2 mixer: projections, a short causal convolution, selective state spaces, a gated norm.

Source: arXiv:2405.21060. The norm follows the gate and spans the inner width, or equal parts of it.
Letters: B batch  T length  D embed  N heads  K groups  P head dim  Z state size
W convolution width  C channels.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ultrathink_jax.kernels.backends import SSD, resolve_ssd
from ultrathink_jax.kernels.conv1d import conv1d
from ultrathink_jax.kernels.per_token import per_token
from ultrathink_jax.kernels.ssd import is_document_start
from ultrathink_jax.layers.linear import Projection
from ultrathink_jax.layers.norm import RMSNorm
from ultrathink_jax.parallel.context import state_before, with_left_border
from ultrathink_jax.parallel.mesh import axis_size
from ultrathink_jax.parallel.sharding import on_each_device
from ultrathink_jax.types import Context

_DT_RANGE = (1e-3, 1e-1)
_DT_FLOOR = 1e-4
_A_RANGE = (1.0, 16.0)

SCAN_LOSS = "scan"  # one value a row of the batch: mean over tokens and heads of the squared log-decay of the state


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


class Filter(NamedTuple):
  """What a causal convolution multiplies its inputs by and adds, float32."""

  kernel: Float[Array, "W C"]
  bias: Float[Array, " C"] | None


class CausalFilter(nn.Module):
  """Returns the filter of `channels` streams, one of its own for each."""

  width: int
  channels: int
  axis: str
  has_bias: bool

  @nn.compact
  def __call__(self) -> Filter:
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=(), batch_axis=1)
    init = nn.with_logical_partitioning(uniform, (None, self.axis))
    kernel = self.param("kernel", init, (self.width, self.channels), jnp.float32)
    if not self.has_bias:
      return Filter(kernel, None)
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,))
    return Filter(kernel, self.param("bias", zeros, (self.channels,), jnp.float32))


class Mamba(nn.Module):
  config: MambaConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: MambaCache | None
  ) -> tuple[Float[Array, "B T D"], MambaCache | None, dict[str, Array]]:
    """Returns the mixed tokens and aux, `SCAN_LOSS` [B].

    With a cache, they follow the cached document (one document a row, padding behind).
    """
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
    filter_axes = {"x": "heads", "b": "state", "c": "state"}
    filters = {
      name: CausalFilter(config.conv_width, dim, filter_axes[name], config.has_conv_bias, name=f"conv_{name}")()
      for name, dim in config.conv_dims.items()
    }
    per_head = lambda name, init: self.param(name, nn.with_logical_partitioning(init, ("heads",)), (N,), jnp.float32)
    dt = jnp.clip(jax.nn.softplus(dt + per_token(per_head("dt_bias", init_dt_bias), (B, T))), *config.dt_limits)
    dt = jnp.where(context.segment_ids[..., None] != 0, dt, 0)
    a, d = -jnp.exp(per_head("a_log", init_a_log)), per_head("d", nn.initializers.ones)
    if cache is None:
      y = _mix_over_devices(config, streams, filters, dt, a, d, context.segment_ids)
    else:
      y, state = _mix(config, streams, filters, dt, a, d, context.segment_ids, cache)
    norm = RMSNorm(config.norm_epsilon, ("heads", "head_dim"), config.norm_groups, name="norm")
    y = norm(y * jax.nn.silu(gate))
    y = Projection((D,), ("heads", "head_dim", "embed"), config.out_scale, config.has_bias, name="out")(y)
    if cache is not None:
      num_tokens = jnp.sum(context.segment_ids != 0, axis=1)
      conv = {name: _last_inputs(cache.conv[name], stream, num_tokens) for name, stream in streams.items()}
      cache = MambaCache(conv, state)
    return y, cache, {SCAN_LOSS: _scan_loss(dt, a, context.segment_ids)}


def _scan_loss(dt: Float[Array, "B T N"], a: Float[Array, " N"], segment_ids: Int[Array, "B T"]) -> Float[Array, " B"]:
  """Returns the mean of (dt a)^2, where dt is 0 at padding."""
  num_tokens = jnp.maximum(jnp.sum(segment_ids != 0, axis=1), 1)
  return jnp.sum(jnp.square(dt * a), axis=(1, 2)) / (a.size * num_tokens)


def _mix(config: MambaConfig, streams, filters, dt, a, d, segment_ids, cache: MambaCache | None):
  """Returns y [B, T, N, P] and the last state of the heads that are given."""
  convolved = {
    name: conv1d(stream, *filters[name], segment_ids, None if cache is None else cache.conv[name])
    for name, stream in streams.items()
  }
  return _recur(config, convolved, dt, a, d, segment_ids, None if cache is None else cache.state)


def _recur(config: MambaConfig, streams, dt, a, d, segment_ids, state):
  """Returns what is read of the recurrence, `d` times its input included, and its last state."""
  split = lambda stream, dim: stream.reshape(*stream.shape[:2], -1, dim)
  x = split(streams["x"], config.head_dim)
  b, c = (split(streams[name], config.state_dim) for name in "bc")
  y, last = SSD[resolve_ssd(config.backend)](x, dt, a, b, c, segment_ids, state, config.chunk_tokens)
  skip = per_token(jnp.broadcast_to(d.astype(x.dtype)[:, None], x.shape[2:]), x.shape[:2])
  return y + x * skip, last


def _mix_over_devices(config: MambaConfig, streams, filters, dt, a, d, segment_ids):
  """Returns y with rows, heads and tokens split over the mesh.

  Where there are fewer groups than devices over which heads are split, each device gets a copy of its group.
  """
  copies = axis_size("tensor") // config.num_groups
  if copies > 1:
    of_groups = lambda array: array.reshape(*array.shape[:-1], config.num_groups, config.state_dim)
    copy = lambda array: jnp.repeat(of_groups(array), copies, axis=-2).reshape(*array.shape[:-1], -1)
    streams, filters = (tree | {name: jax.tree.map(copy, tree[name]) for name in "bc"} for tree in (streams, filters))
  channels = {"x": "heads", "b": "groups", "c": "groups"}
  tokens = ("batch", "length")
  in_axes = (
    {name: (*tokens, axis) for name, axis in channels.items()},
    {name: Filter((None, axis), (axis,) if config.has_conv_bias else None) for name, axis in channels.items()},
    (*tokens, "heads"),
    ("heads",),
    ("heads",),
    tokens,
  )
  return on_each_device(partial(_mix_over_context, config), in_axes, (*tokens, "heads", None))(
    streams, filters, dt, a, d, segment_ids
  )


def _mix_over_context(config: MambaConfig, streams, filters, dt, a, d, segment_ids) -> Float[Array, "B T N P"]:
  """Returns y of this device's tokens.

  Convolutions read over the left border. The recurrence begins with a state of 0; once all shards know what they add to
  the state and keep of it, y gets the share of the state that came in.
  """
  if axis_size("context") == 1:
    return _mix(config, streams, filters, dt, a, d, segment_ids, None)[0]
  border = config.conv_width - 1
  joined = with_left_border(segment_ids, border)
  convolved = {
    name: conv1d(with_left_border(stream, border), *filters[name], joined)[:, border:]
    for name, stream in streams.items()
  }
  y, added = _recur(config, convolved, dt, a, d, segment_ids, None)
  starts = is_document_start(with_left_border(segment_ids, 1))[:, 1:]
  is_continued = jnp.cumsum(starts, axis=1)[..., None] == 0
  left = jnp.where(is_continued, jnp.exp(jnp.cumsum(dt * a, axis=1)), 0)  # of the state that came in, after each token
  state = state_before(added, left[:, -1])
  c = convolved["c"].reshape(*y.shape[:2], -1, config.state_dim)
  state = state.astype(y.dtype).reshape(state.shape[0], c.shape[2], -1, *state.shape[2:])
  carried = jnp.einsum("btkz,bkgpz->btkgp", c, state, preferred_element_type=left.dtype)
  return (y + left[..., None] * carried.reshape(y.shape)).astype(y.dtype)


def _last_inputs(before: Float[Array, "B W D"], x: Float[Array, "B T D"], num_tokens: Int[Array, " B"]) -> Array:
  """Returns the last W inputs up to each row's last token, those of `before` included."""
  W = before.shape[1]
  joined = jnp.concatenate([before, x.astype(before.dtype)], axis=1)
  indices = num_tokens[:, None] + jnp.arange(W)
  return jnp.take_along_axis(joined, indices[..., None], axis=1)
