"""Sophia-G: momentum divided by a moving average of the loss's curvature, every entry cut at 1.

The curvature is that of Gauss and Newton, on its diagonal: with targets drawn from the model's own distribution, the
squared gradient of the summed loss has its sum over tokens as mean (Bartlett). optax.contrib.sophia estimates with the
step's own targets or by Hutchinson, divides by the average of the step before, and corrects momentum for its start.

Source: arXiv:2305.14342 algorithms 2 and 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ultrathink_jax.errors import ConfigError

_LEAST = 1e-15  # what momentum is divided by at least


class SophiaState(NamedTuple):
  """Updates so far, momentum, and the moving average of the curvature."""

  count: Array
  mu: Any
  nu: Any


def curvature_of(gradients: Any, weight: Float[Array, ""]) -> Any:
  """Returns the estimate, per token, from the gradients of a summed loss of sampled targets and the sum of weights.

  Unbiased if the loss counts each token by the square root of its weight.
  """
  return jax.tree.map(lambda g: jnp.square(g) / jnp.maximum(weight, 1e-8), gradients)


def scale_by_sophia(
  b1: float, b2: float, rho: float, every_steps: int, mu_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
  """Returns clip(momentum / (rho * curvature), 1); `update` takes `curvature`, () -> its estimate.

  It is called at every `every_steps`th update. What is not finite of an estimate is left out.
  """

  def init(params: Any) -> SophiaState:
    mu = optax.tree.zeros_like(params, dtype=mu_dtype)
    return SophiaState(jnp.zeros((), jnp.int32), mu, optax.tree.zeros_like(params))

  def update(
    gradients: Any, state: SophiaState, params: Any = None, *, curvature: Callable[[], Any] | None = None, **_: Any
  ) -> tuple[Any, SophiaState]:
    if curvature is None:
      raise ConfigError(
        "optimizer.name='sophia' needs targets drawn from the model, which this recipe does not have; "
        "choose another optimizer.name, as 'adamw'"
      )

    def average(old: Any) -> Any:
      blend = lambda h, new: jnp.where(jnp.isfinite(new), b2 * h + (1 - b2) * new, h)
      return jax.tree.map(blend, old, curvature())

    nu = jax.lax.cond(state.count % every_steps == 0, average, lambda old: old, state.nu)
    mu = optax.tree.update_moment(gradients, state.mu, b1, 1)
    updates = jax.tree.map(lambda m, h: jnp.clip(m / jnp.maximum(rho * h, _LEAST), -1, 1), mu, nu)
    return updates, SophiaState(optax.safe_increment(state.count), optax.tree.cast(mu, mu_dtype), nu)

  return optax.GradientTransformationExtraArgs(init, update)
