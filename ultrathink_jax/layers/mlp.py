"""The feed-forward layer. Source: arXiv:2002.05202. Letters: B batch  T length  D embed  F mlp."""

import dataclasses

from flax import linen as nn
from jaxtyping import Array, Float

from ultrathink_jax.kernels.activation import ACTIVATIONS, activate
from ultrathink_jax.layers.linear import Projection
from ultrathink_jax.types import Context


@dataclasses.dataclass(frozen=True)
class MlpConfig:
  mlp_dim: int
  activation: str
  has_bias: bool
  out_scale: float  # of the output projection's initial deviation


class Mlp(nn.Module):
  config: MlpConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: None
  ) -> tuple[Float[Array, "B T D"], None, dict[str, Array]]:
    """Returns down(activate(gate x, up x)), token by token; activations without a gate have no gate projection."""
    c = self.config
    inward = lambda name: Projection((c.mlp_dim,), ("embed", "mlp"), has_bias=c.has_bias, name=name)(x)
    gate = inward("gate") if ACTIVATIONS[c.activation].is_gated else None
    hidden = activate(c.activation, gate, inward("up"))
    return Projection(x.shape[-1:], ("mlp", "embed"), c.out_scale, c.has_bias, name="down")(hidden), None, {}
