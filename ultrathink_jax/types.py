"""The values that cross floors: what a model reads, what it returns, what a recipe is and what a training run carries.

Letters: B batch, T query length, D embed, V vocab.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Float, Int

Parameters = Any  # a nested dict of arrays, keyed by layer name


class Rotation(NamedTuple):
  """Cosine and sine of the angle of each position and each of the R pairs of dims that rotary embedding turns."""

  cos: Float[Array, "B T 1 R"]
  sin: Float[Array, "B T 1 R"]


class Context(NamedTuple):
  """Where each token stands: `positions` count from 0 inside a document, `segment_ids` are 0 for padding.

  Tokens see each other only where their segment ids are equal and not 0. `router_noise` is the standard deviation of
  noise on the routers' logits, from the random stream "router"; None, outside training, is no noise. The language model
  fills in `rotation` once for all its layers.
  """

  positions: Int[Array | np.ndarray, "B T"]
  segment_ids: Int[Array | np.ndarray, "B T"]
  router_noise: Float[Array, ""] | None = None
  rotation: Rotation | None = None


class Batch(NamedTuple):
  """Packed rows of tokens; `targets` are the tokens that follow and `weights` what each of their losses counts."""

  tokens: Int[Array | np.ndarray, "B T"]
  targets: Int[Array | np.ndarray, "B T"]
  weights: Float[Array | np.ndarray, "B T"]
  context: Context


class Output(NamedTuple):
  """What a language model returns.

  Attributes:
    hidden: final hidden states after the last norm, times the model's logits multiplier, in the compute dtype.
    unembedding: a row for every token of the vocabulary, float32; losses apply it in chunks.
    soft_cap: logits are cap * tanh(hidden unembedding^T / cap); None where the model has no cap.
    cache: the caches to decode with, or None in training.
    aux: {layer path: {name: array}} of routing losses and counts, stacked over the repeats of a period.
    taps: {layer path: [R, B, T, D]} residual stream after each layer; removed by the compiler where nothing reads it.
  """

  hidden: Float[Array, "B T D"]
  unembedding: Float[Array, "V D"]
  soft_cap: Float[Array, ""] | float | None
  cache: Any
  aux: dict[str, dict[str, Array]]
  taps: dict[str, Array]


class LossInfo(NamedTuple):
  """What comes with a summed loss: `weight` divides it once per step; `metrics` are sums over micro-batches too."""

  weight: Float[Array, ""]
  metrics: dict[str, Array]


class Adapter(NamedTuple):
  """What stands beside one weight matrix W, the dims of its input and of its output each as one.

  It adds scale x A B to x W. Leaves are stacked as the matrix is, over layers and experts.

  Attributes:
    scale: alpha / r, or alpha / sqrt(r); one a layer.
    magnitude: DoRA's: the sum's columns are scaled to these lengths.
    dropout: share of x that A does not see, in training.
    a0, b0: PiSSA's: A and B at the start, whose product is taken off again.
  """

  a: Float[Array, "*stack D r"]
  b: Float[Array, "*stack r F"]
  scale: Float[Array, "*layers"]
  magnitude: Float[Array, "*stack F"] | None = None
  dropout: Float[Array, "*layers"] | None = None
  a0: Float[Array, "*stack D r"] | None = None
  b0: Float[Array, "*stack r F"] | None = None


class Adapted(NamedTuple):
  """Parameters as an adapted model reads them, each a tree by the same paths.

  Attributes:
    params: float weights.
    quantized: kernels in few bits, which `params` then lacks.
    lora: an Adapter, named "adapter", where a kernel has one.
  """

  params: Parameters
  quantized: Parameters
  lora: Parameters


class GuardState(NamedTuple):
  """What train/guard.py knows of earlier steps.

  Attributes:
    window: loss per token and gradient norm of the last W steps, in a ring.
    recorded: how many steps the window was given; its next place is recorded mod W.
    skipped: steps that were not applied, all in all.
    skipped_in_a_row: and up to the last one.
  """

  window: Float[Array, "2 W"]
  recorded: Int[Array, ""]
  skipped: Int[Array, ""]
  skipped_in_a_row: Int[Array, ""]


class TrainState(NamedTuple):
  """All that a step changes and a checkpoint holds."""

  step: Int[Array, ""]
  params: Parameters
  opt_state: Any
  guard: GuardState


class Source(Protocol):
  """Where a run reads its batches."""

  def __call__(self, step: int, state: TrainState) -> Batch:
    """Returns this process's share of the batch of a step, a host integer: reading never waits for the device."""
    ...

  def samples(self, step: int) -> str:
    """Returns which samples the batch of a step is made of, for people."""
    ...


class Recipe(NamedTuple):
  """A training method as pure functions; see recipes/pretrain.py for the first one.

  Attributes:
    init: (key, base or None) -> (params, frozen); `base` are the parameters of a whole model to begin with, `frozen`
      weights that are read and never trained, saved or donated.
    axes: the tree of logical axis names of every parameter, shaped like `params`.
    loss: (params, frozen, batch, optimizer step, key) -> (summed loss, LossInfo).
    source: (prepared data, rows) -> Source of batches of numpy arrays, of which only `rows`, in that order, are read.
    summarize: the summed metrics of a step, on the host -> the numbers to report.
    sampled_loss: as loss, of targets drawn from the model itself; what estimates of its curvature are made of.
    frozen_axes, base_axes: logical axis names of `frozen` and of the base; None where nothing is frozen.
    weights: (params, frozen) -> what the model reads outside training.
  """

  init: Callable[..., tuple[Parameters, Any]]
  axes: Any
  loss: Callable[..., tuple[Array, LossInfo]]
  source: Callable[[Any, Sequence[int]], Source]
  summarize: Callable[[dict[str, Any]], dict[str, Any]]
  sampled_loss: Callable[..., tuple[Array, LossInfo]] | None = None
  frozen_axes: Any = None
  base_axes: Any = None
  weights: Callable[[Parameters, Any], Any] = lambda params, frozen: params
