"""The SwiGLU feed-forward layer. Source: arXiv:2002.05202. Letters: B batch  T length  D embed  F mlp."""

import dataclasses

from flax import linen as nn
from jaxtyping import Array, Float

from ultrathink_jax.layers.linear import Projection, swiglu
from ultrathink_jax.types import Context


@dataclasses.dataclass(frozen=True)
class MlpConfig:
  mlp_dim: int
  out_scale: float  # of the output projection's initial deviation


class Mlp(nn.Module):
  config: MlpConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: None
  ) -> tuple[Float[Array, "B T D"], None, dict[str, Array]]:
    """Returns down(silu(gate x) * up x), token by token."""
    gate = Projection((self.config.mlp_dim,), ("embed", "mlp"), name="gate")(x)
    up = Projection((self.config.mlp_dim,), ("embed", "mlp"), name="up")(x)
    y = Projection(x.shape[-1:], ("mlp", "embed"), self.config.out_scale, name="down")(swiglu(gate, up))
    return y, None, {}
