"""Mixture of experts: a softmax router picks the top experts of each token.

Source: arXiv:2101.03961 (load balance), arXiv:2202.08906 (router z-loss). Both losses are taken per row of the batch
and averaged over rows by their loss weight, so that neither accumulation nor the number of devices changes them.
Letters: B batch  T length  D embed  E experts  K choices of a token.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from ultrathink_jax.kernels.experts_sorted import experts_sorted
from ultrathink_jax.layers.linear import ExpertBank, Projection
from ultrathink_jax.types import Context


@dataclasses.dataclass(frozen=True)
class MoeConfig:
  num_experts: int
  experts_per_token: int
  expert_dim: int
  capacity_factor: float  # rows an expert takes / its even share; 0: no limit
  out_scale: float  # of the output projections' initial deviation


class Moe(nn.Module):
  config: MoeConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: None
  ) -> tuple[Float[Array, "B T D"], None, dict[str, Array]]:
    """Returns the experts' weighted sum and aux: load_balance [B], router_z [B], load [E] (choices), dropped []."""
    config = self.config
    B, T, D = x.shape
    E, K, F = config.num_experts, config.experts_per_token, config.expert_dim
    is_token = context.segment_ids != 0
    logits = Projection((E,), ("embed", "expert"), name="router")(x.astype(jnp.float32))
    probabilities = jax.nn.softmax(logits, axis=-1)
    gates, choices = jax.lax.top_k(probabilities, K)
    gates /= jnp.sum(gates, axis=-1, keepdims=True)
    bank = lambda name, axes, dims, scale=1.0: ExpertBank(E, *dims, ("expert", *axes), scale, name=name)(x.dtype)
    capacity = None
    if config.capacity_factor:
      capacity = min(B * T, math.ceil(config.capacity_factor * B * T * K / E))
    y, is_computed = experts_sorted(
      x.reshape(B * T, D),
      jnp.where(is_token[..., None], choices, E).reshape(B * T, K),
      gates.reshape(B * T, K),
      bank("gate", ("embed", "mlp"), (D, F)),
      bank("up", ("embed", "mlp"), (D, F)),
      bank("down", ("mlp", "embed"), (F, D), config.out_scale),
      capacity,
    )
    aux = _routing_losses(logits, probabilities, choices, is_token)
    aux["dropped"] = aux["load"].sum() - jnp.sum(is_computed, dtype=jnp.float32)
    return y.reshape(B, T, D), None, aux


def _routing_losses(
  logits: Float[Array, "B T E"],
  probabilities: Float[Array, "B T E"],
  choices: Int[Array, "B T K"],
  is_token: Bool[Array, "B T"],
) -> dict[str, Array]:
  """Returns load_balance [B] = E sum_e f_e P_e (1 when even), router_z [B] = mean logsumexp^2, load [E] = choices."""
  E, K = logits.shape[-1], choices.shape[-1]
  token = is_token.astype(jnp.float32)
  num_tokens = jnp.maximum(token.sum(axis=1), 1)
  chosen = jax.nn.one_hot(choices, E).sum(axis=2) * token[..., None]
  load = chosen.sum(axis=1)  # [B, E]
  probability = jnp.einsum("bte,bt->be", probabilities, token)
  load_balance = E * jnp.sum(load * probability, axis=-1) / (K * jnp.square(num_tokens))
  router_z = jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * token, axis=1) / num_tokens
  return {"load_balance": load_balance, "router_z": router_z, "load": load.sum(axis=0)}
