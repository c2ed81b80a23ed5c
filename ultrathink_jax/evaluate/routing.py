"""How two models spread the same tokens over their experts.

Letters: E experts.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.models.layer import layer_paths

_DEAD_SHARE = 0.1  # of an even share


class Utilisation(NamedTuple):
  """How a layer's choices are spread.

  Attributes:
    shares: of each expert.
    entropy: of the shares, 1 where they are even.
    busiest: the largest share times the number of experts.
    variation: standard deviation of the shares / their mean.
    dead: experts with less than a tenth of an even share.
  """

  shares: list[float]
  entropy: float
  busiest: float
  variation: float
  dead: int


class LayerShift(NamedTuple):
  """One layer of experts: `divergence` is the Jensen-Shannon divergence of the shares in bits, 0 to 1.

  `is_collapsed` says that one expert of the second model has more than the share that is worth an alarm.
  """

  layer: int
  divergence: float
  base_model: Utilisation
  finetuned_model: Utilisation
  is_collapsed: bool


def jensen_shannon(p: Float[np.ndarray, "E"], q: Float[np.ndarray, "E"]) -> float:
  """Returns the Jensen-Shannon divergence of two distributions in bits: 0 if they are equal, 1 if they are disjoint."""
  middle = (p + q) / 2
  relative = lambda a: float(np.sum(a[a > 0] * np.log2(a[a > 0] / middle[a > 0])))
  return max(0.0, (relative(p) + relative(q)) / 2)


def utilisation(load: Float[np.ndarray, "E"]) -> Utilisation:
  """Returns how counts of choices are spread."""
  shares = load / load.sum()
  E = len(shares)
  used = shares[shares > 0]
  entropy = float(-(used * np.log(used)).sum() / np.log(E)) if E > 1 else 1.0
  dead = int((shares * E < _DEAD_SHARE).sum())
  return Utilisation(shares.tolist(), entropy, float(shares.max() * E), float(shares.std() * E), dead)


def routing_shift(
  model: ModelConfig, base: dict[str, np.ndarray], tuned: dict[str, np.ndarray], collapse_share: int | float
) -> list[LayerShift]:
  """Returns every layer of experts, first to last, of loads {path: choices [R, E]} on the same tokens.

  A layer is collapsed where an expert has more than `collapse_share` of the choices, and more than two even shares: of
  few experts one has a large share by right. A share of 0 turns the alarm off.
  """
  shifts = []
  for number, path, repeat in layer_paths(model):
    if path in base:
      before, after = utilisation(base[path][repeat]), utilisation(tuned[path][repeat])
      divergence = jensen_shannon(np.array(before.shares), np.array(after.shares))
      limit = max(collapse_share, 2 / len(after.shares))
      is_collapsed = bool(collapse_share) and max(after.shares) > limit
      shifts.append(LayerShift(number, divergence, before, after, is_collapsed))
  return shifts
