"""Next-token cross-entropy with the routing losses of expert layers.

Letters: B batch  R repeats of a period  E experts.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ultrathink_jax.config import LossConfig
from ultrathink_jax.kernels.cross_entropy_chunked import cross_entropy_chunked
from ultrathink_jax.parallel.sharding import constrain
from ultrathink_jax.types import Batch, LossInfo, Output


def language_modeling_loss(output: Output, batch: Batch, config: LossConfig) -> tuple[Float[Array, ""], LossInfo]:
  """Returns the summed loss and, as sums to be divided by the weight, its parts.

  A routing loss is the mean over expert layers; each row of the batch counts by its loss weight. Metrics: `loss/lm` and
  the routing losses `loss/NAME` unweighted, `loss/total`; `moe/load/PATH` [R, E] and `moe/dropped` count choices of
  experts.
  """
  unembedding = constrain(output.unembedding, ("vocab", None))  # gathered once, not for every chunk
  lm = cross_entropy_chunked(output.hidden, unembedding, batch.targets, batch.weights, output.soft_cap)
  metrics = {"loss/lm": lm}
  total = lm
  if output.aux:
    row_weights = batch.weights.sum(axis=1)
    num_layers = sum(values["load"].shape[0] for values in output.aux.values())
    weights = {
      "load_balance": config.load_balance_weight,
      "router_z": config.router_z_weight,
      "router_importance": config.router_importance_weight,
      "router_entropy": config.router_entropy_weight,
    }
    for name, weight in weights.items():
      layers = sum(jnp.sum(values[name] * row_weights) for values in output.aux.values())
      metrics[f"loss/{name}"] = layers / num_layers
      if weight:  # else there is no gradient to work out
        total += weight * metrics[f"loss/{name}"]
    total += sum(jnp.sum(values["router_bias"]) for values in output.aux.values() if "router_bias" in values)
    metrics["moe/dropped"] = sum(jnp.sum(values["dropped"]) for values in output.aux.values())
    metrics |= {f"moe/load/{path}": values["load"] for path, values in output.aux.items()}
  metrics["loss/total"] = total
  return total, LossInfo(batch.weights.sum(), metrics)
