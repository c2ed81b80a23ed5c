"""Adapters as files and exchanges hold them: by name, one a weight matrix, layers unstacked.

Letters: E experts; in, out: dims of the matrix, those of its kernel flattened to one each; r rank.
"""

from typing import NamedTuple

import numpy as np


class NamedAdapter(NamedTuple):
  """What stands beside one weight matrix or one bank of them; its key is the kernel's name in files.

  y = x W + scale (x a) b, with scale = alpha / r, or alpha / sqrt(r) where the adapters are rank-stabilised.

  Attributes:
    a: float32 [in, r]; of a bank [E, in, r].
    b: float32 [r, out]; of a bank [E, r, out].
    alpha: the numerator of the scale.
    magnitude: [out], of DoRA: y = magnitude / ||W + scale a b|| * (x W + scale (x a) b), a norm for each column.
  """

  a: np.ndarray
  b: np.ndarray
  alpha: float
  magnitude: np.ndarray | None = None

  @property
  def rank(self) -> int:
    return self.a.shape[-1]
