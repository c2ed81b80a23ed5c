"""Loss, perplexity and bits per byte of a model on held-out documents.

Letters: B batch  T length.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.kernels.cross_entropy_chunked import cross_entropy_chunked
from ultrathink_jax.models.language_model import LanguageModel, inference_config, variables
from ultrathink_jax.types import Batch, Parameters


class Evaluation(NamedTuple):
  """Attributes:
  loss: nats per target, ends of sequences included.
  perplexity: e^loss.
  bits_per_byte: bits to code a byte of the text, what a compressor is measured by.
  targets: how many tokens were predicted.
  """

  loss: float
  perplexity: float
  bits_per_byte: float
  targets: int


def make_sum_of_losses(model: ModelConfig) -> Callable[[Parameters, Batch], tuple[jax.Array, jax.Array]]:
  """Returns a compiled (params, batch) -> (weighted sum of token losses in nats, sum of weights)."""
  model = inference_config(model)

  @jax.jit
  def sum_of_losses(params: Parameters, batch: Batch) -> tuple[jax.Array, jax.Array]:
    output = LanguageModel(model).apply(variables(params), batch.tokens, batch.context)
    loss = cross_entropy_chunked(output.hidden, output.unembedding, batch.targets, batch.weights, output.soft_cap)
    return loss, batch.weights.sum()

  return sum_of_losses


def evaluate(
  sum_of_losses: Callable[[Parameters, Batch], tuple[Any, Any]],
  params: Parameters,
  batches: Iterable[Batch],
  bytes_per_target: float,
) -> Evaluation:
  """Returns the evaluation over `batches`; `bytes_per_target` is that of the whole split they come from."""
  loss, weight = 0.0, 0.0
  for batch in batches:
    batch_loss, batch_weight = sum_of_losses(params, batch)
    loss, weight = loss + float(batch_loss), weight + float(batch_weight)
  mean = loss / weight
  perplexity = math.exp(mean) if mean < 700 else math.inf
  return Evaluation(mean, perplexity, mean / (math.log(2) * bytes_per_target), round(weight))
