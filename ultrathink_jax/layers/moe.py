"""Mixture of experts: a router picks the feed-forward layers that a token passes.

Routing losses are taken per row of the batch and averaged over rows by their loss weight, so that neither accumulation
nor the number of devices changes them.
Letters: B batch  T length  D embed  E experts  K choices of a token  F expert width.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from ultrathink_jax.kernels.activation import ACTIVATIONS
from ultrathink_jax.kernels.backends import EXPERTS, resolve_experts
from ultrathink_jax.layers.linear import ExpertBank, Projection
from ultrathink_jax.layers.mlp import Mlp, MlpConfig
from ultrathink_jax.layers.router import Logits, RouterConfig, Routing, bias_step, draw_noise, route, routing_losses
from ultrathink_jax.parallel.experts import experts_over_mesh
from ultrathink_jax.types import Context


@dataclasses.dataclass(frozen=True)
class MoeConfig:
  num_experts: int
  expert_dim: int
  shared_dim: int  # width of the expert that every token passes; 0: none
  activation: str
  capacity_factor: float  # rows an expert takes / its even share; 0: no limit
  buffer_factor: float  # expert axis, without a capacity: rows a device takes from another / an even share
  chunks: int  # expert axis: parts of a device's tokens that are exchanged one by one
  router: RouterConfig
  backend: str
  out_scale: float  # of the output projections' initial deviation


class Moe(nn.Module):
  config: MoeConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: None
  ) -> tuple[Float[Array, "B T D"], None, dict[str, Array]]:
    """Returns the experts' weighted sum and aux: losses [B], load [E] (choices), dropped [], and router_bias [] if any.

    The losses and the load are those of `routing_losses`; router_bias is `bias_step`. A capacity is a share of the
    whole batch on one device, and on a mesh of the tokens of each device: GShard's groups.
    """
    c = self.config
    E, D, F = c.num_experts, x.shape[-1], c.expert_dim
    is_token = context.segment_ids != 0
    bias = None
    if c.router.has_bias:
      init = nn.with_logical_partitioning(nn.initializers.zeros, ("expert",))
      bias = self.param("router_bias", init, (E,), jnp.float32)
    routing = self._route(x, context, bias)
    bank = lambda name, axes, dims, scale=1.0: ExpertBank(E, *dims, ("expert", *axes), x.dtype, scale, name=name)()
    y, is_computed = experts_over_mesh(
      partial(EXPERTS[resolve_experts(c.backend, c.capacity_factor or None)], activation=c.activation),
      x,
      jnp.where(is_token[..., None], routing.choices, E),
      routing.gates,
      bank("gate", ("embed", "mlp"), (D, F)) if ACTIVATIONS[c.activation].is_gated else None,
      bank("up", ("embed", "mlp"), (D, F)),
      bank("down", ("mlp", "embed"), (F, D), c.out_scale),
      capacity_factor=c.capacity_factor,
      buffer_factor=c.buffer_factor,
      chunks=c.chunks,
    )
    if c.shared_dim:
      y += Mlp(MlpConfig(c.shared_dim, c.activation, False, c.out_scale), name="shared")(x, context, None)[0]
    aux = routing_losses(routing, is_token, E)
    aux["dropped"] = aux["load"].sum() - jnp.sum(is_computed, dtype=jnp.float32)
    if bias is not None:
      aux["router_bias"] = bias_step(bias, aux["load"])
    return y, None, aux

  def _route(self, x: Float[Array, "B T D"], context: Context, bias: Float[Array, " E"] | None) -> Routing:
    c = self.config.router
    x = x.astype(jnp.float32)
    # What a device calls a float32 product by default may keep 10 bits, enough to choose other experts.
    with jax.default_matmul_precision("float32"):
      experts = Projection((self.config.num_experts,), ("embed", "expert"), name="router")(x)
      groups = None
      if c.group_sizes:
        groups = Projection((len(c.group_sizes),), ("embed", None), name="group_router")(x)
    logits, noise = Logits(experts, groups), None
    if context.router_noise is not None:
      noise = draw_noise(logits, context.router_noise, self.make_rng("router"))
    return route(logits, noise, bias, c)
