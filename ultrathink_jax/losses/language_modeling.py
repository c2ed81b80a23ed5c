"""Next-token cross-entropy with the auxiliary losses of the softmax and of layers.

Letters: B batch  R repeats of a period  E experts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ultrathink_jax.config import LossConfig
from ultrathink_jax.kernels.cross_entropy_chunked import cross_entropy_chunked, sample_tokens, token_loss_chunked
from ultrathink_jax.layers.mamba import SCAN_LOSS
from ultrathink_jax.layers.router import ROW_LOSSES
from ultrathink_jax.parallel.sharding import constrain
from ultrathink_jax.types import Batch, LossInfo, Output


def loss_weights(config: LossConfig) -> dict[str, float]:
  """Returns what each part of the loss counts: the loss is the sum of the parts `loss/NAME` times these.

  `smoothing` is the cross-entropy with an even distribution, `z` the squared log of the softmax's normaliser.
  """
  return {
    "lm": 1 - config.label_smoothing,
    "smoothing": config.label_smoothing,
    "z": config.z_weight,
    "scan": config.scan_weight,
    "load_balance": config.load_balance_weight,
    "router_z": config.router_z_weight,
    "router_importance": config.router_importance_weight,
    "router_entropy": config.router_entropy_weight,
  }


def language_modeling_loss(output: Output, batch: Batch, config: LossConfig) -> tuple[Float[Array, ""], LossInfo]:
  """Returns the summed loss and, as sums to be divided by the weight, its parts.

  A loss of layers is the mean over those that have it; each row of the batch counts by its loss weight. Metrics:
  `loss/lm` and the other parts `loss/NAME` unweighted, those of routers at any weight and the rest where they have one;
  `loss/total`; `moe/load/PATH` [R, E] and `moe/dropped` count choices of experts.
  """
  unembedding = constrain(output.unembedding, ("vocab", None))  # gathered once, not for every chunk
  total, losses = token_loss_chunked(
    output.hidden,
    unembedding,
    batch.targets,
    batch.weights,
    output.soft_cap,
    config.label_smoothing,
    config.z_weight,
  )
  parts = {"smoothing": losses.even, "z": losses.z}
  metrics = {"loss/lm": losses.target} | {f"loss/{name}": part for name, part in parts.items() if part is not None}
  row_weights = batch.weights.sum(axis=1)
  routers = {path: values for path, values in output.aux.items() if "load" in values}
  is_pooled = config.load_balance_form == "pooled"
  in_layers = [(SCAN_LOSS, output.aux)] if config.scan_weight else []
  in_layers += [(name, routers) for name in ROW_LOSSES if routers and not (name == "load_balance" and is_pooled)]
  for name, layers in in_layers:
    metrics[f"loss/{name}"] = _mean_over_layers(name, layers, row_weights)
    weight = loss_weights(config)[name]
    if weight:  # else there is no gradient to work out
      total += weight * metrics[f"loss/{name}"]
  if routers and is_pooled:
    metrics["loss/load_balance"] = row_weights.sum() * _pooled_load_balance(routers)
    total += config.load_balance_weight * metrics["loss/load_balance"]
  if routers:
    total += sum(jnp.sum(values["router_bias"]) for values in routers.values() if "router_bias" in values)
    metrics["moe/dropped"] = sum(jnp.sum(values["dropped"]) for values in routers.values())
    metrics |= {f"moe/load/{path}": values["load"] for path, values in routers.items()}
  metrics["loss/total"] = total
  return total, LossInfo(batch.weights.sum(), metrics)


def _pooled_load_balance(routers: dict[str, dict[str, Array]]) -> Float[Array, ""]:
  """Returns E sum_e f_e P_e of all layers' tokens together: K, the experts a token chooses, where the load is even.

  It is what transformers adds for Mixtral (arXiv:2101.03961 eq. 4 without dividing by K, over all layers at once), of
  the tokens of a micro-batch.
  """
  load = sum(jnp.sum(values["load"], axis=0) for values in routers.values())
  probability = sum(jnp.sum(values["probability"], axis=0) for values in routers.values())
  tokens = jnp.maximum(jnp.sum(probability), 1e-20)  # times layers: probabilities of a token sum to 1
  return load.size * jnp.sum(jax.lax.stop_gradient(load) / tokens * probability / jax.lax.stop_gradient(tokens))


def sampled_loss(output: Output, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], LossInfo]:
  """Returns the summed cross-entropy with targets drawn from the model's own distribution, and the sum of weights.

  The gradient reaches `output` and not the draw. Tokens count by the square root of their weight, so that the squared
  gradient over the sum of weights has the diagonal of the Gauss-Newton matrix as its mean: see optimizers/sophia.py.
  """
  unembedding = constrain(output.unembedding, ("vocab", None))
  targets = sample_tokens(output.hidden, unembedding, output.soft_cap, key)
  weights = jnp.sqrt(batch.weights)
  loss = cross_entropy_chunked(output.hidden, unembedding, targets, weights, output.soft_cap)
  return loss, LossInfo(batch.weights.sum(), {})


def _mean_over_layers(
  name: str, layers: dict[str, dict[str, Array]], row_weights: Float[Array, " B"]
) -> Float[Array, ""]:
  """Returns the mean over the layers that have this loss [R, B] of its sum over rows; 0 where none has it."""
  values = [aux[name] for aux in layers.values() if name in aux]
  total = sum((jnp.sum(rows * row_weights) for rows in values), jnp.float32(0))
  return total / max(1, sum(rows.shape[0] for rows in values))
