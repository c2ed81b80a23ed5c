"""Which steps a run takes back: those whose loss or gradient is not finite, or far above what it was of late.

Letters: W steps of the window.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ultrathink_jax.config import GuardConfig
from ultrathink_jax.types import GuardState


def begin(config: GuardConfig) -> GuardState:
  """Returns the state before the first step."""
  window = jnp.zeros((2, config.window_steps), jnp.float32)
  return GuardState(window, *(jnp.zeros((), jnp.int32) for _ in range(3)))


def judge(
  config: GuardConfig, state: GuardState, loss: Float[Array, ""], norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], GuardState]:
  """Returns whether a step with this loss per token and gradient norm counts, and the next state.

  A spike is a value more than `spike_sigmas` standard deviations above the mean of the window, once half of that is
  filled. It enters the window as the highest value that would have counted: a single one changes little, and what has
  become the rule is soon taken for it.
  """
  values = jnp.stack([loss, norm]).astype(jnp.float32)
  is_finite = jnp.all(jnp.isfinite(values))
  is_spike, recorded = jnp.zeros((), bool), values
  if config.spike_sigmas:
    W = config.window_steps
    seen = jnp.arange(W) < state.recorded
    number = jnp.maximum(seen.sum(), 1)
    mean = jnp.sum(state.window, axis=1, where=seen) / number
    variance = jnp.sum(jnp.square(state.window - mean[:, None]), axis=1, where=seen) / number
    most = mean + config.spike_sigmas * jnp.sqrt(variance)
    is_judged = state.recorded >= W // 2
    is_spike = is_judged & jnp.any(values > most)
    recorded = jnp.where(is_judged, jnp.minimum(values, most), values)
  counts = is_finite & ~is_spike
  window = state.window.at[:, state.recorded % config.window_steps].set(recorded)
  return counts, GuardState(
    window=jnp.where(is_finite, window, state.window),
    recorded=state.recorded + is_finite,
    skipped=state.skipped + ~counts,
    skipped_in_a_row=jnp.where(counts, 0, state.skipped_in_a_row + 1),
  )
