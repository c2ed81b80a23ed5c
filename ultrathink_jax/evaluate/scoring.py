"""Several parameters of one model scored on the same rows.

Letters: R repeats of a period  E experts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.evaluate.windows import Scored, rows, sum_by_owner
from ultrathink_jax.kernels.token_scores import TokenScores, token_scores
from ultrathink_jax.models.language_model import LanguageModel, inference_config, variables
from ultrathink_jax.types import Batch

Score = Callable[[Any, Batch], tuple[TokenScores, dict[str, Array]]]


class Scores(NamedTuple):
  """Sums over the targets of each sequence that count.

  Attributes:
    nats: negative log-likelihood.
    correct: how many the model would have chosen.
    targets: how many there are.
    loads: {path of a layer of experts: choices of each expert [R, E]}, over all tokens that were read.
  """

  nats: Float[np.ndarray, "sequences"]
  correct: Int[np.ndarray, "sequences"]
  targets: Int[np.ndarray, "sequences"]
  loads: dict[str, Float[np.ndarray, "R E"]]


def make_score(model: ModelConfig) -> Score:
  """Returns a compiled (params, batch) -> (scores of its targets, loads of its layers of experts)."""
  return partial(_score, inference_config(model))


@partial(jax.jit, static_argnums=0)
def _score(model: ModelConfig, params: Any, batch: Batch) -> tuple[TokenScores, dict[str, Array]]:
  output = LanguageModel(model).apply(variables(params), batch.tokens, batch.context)
  scores = token_scores(output.hidden, output.unembedding, batch.targets, output.soft_cap)
  return scores, {path: values["load"] for path, values in output.aux.items() if "load" in values}


def score_all(
  score: Score, all_params: Sequence[Any], sequences: Sequence[Scored], size: int, batch_size: int
) -> list[Scores]:
  """Returns the scores by each of the parameters, which may share arrays; windows have `size` positions."""
  num = len(sequences)
  targets = np.array([int(sequence.counts.sum()) for sequence in sequences], np.int64)
  nats, correct = np.zeros((len(all_params), num)), np.zeros((len(all_params), num))
  loads: list[dict[str, np.ndarray]] = [{} for _ in all_params]
  for batch, owners in rows(sequences, size, batch_size):
    for i, params in enumerate(all_params):
      scores, batch_loads = jax.device_get(score(params, batch))
      nats[i] += sum_by_owner(owners, scores.nats, num)
      correct[i] += sum_by_owner(owners, scores.is_best, num)
      for path, load in batch_loads.items():
        loads[i][path] = loads[i].get(path, 0) + load.astype(np.float64)
  return [Scores(nats[i], correct[i].astype(np.int64), targets, loads[i]) for i in range(len(all_params))]
