"""Which experts a token goes to, and how uneven that is.

A router scores every expert; the best K are chosen, and their scores are the gates. Losses look at the decisions behind
the scores, its levels: one over all experts, or, of a grouped router, one over the groups and one inside each group.

Source: arXiv:1701.06538 (noise, importance), arXiv:2101.03961 (load balance), arXiv:2202.08906 (z-loss),
arXiv:2412.19437 (sigmoid scores), arXiv:2408.15664 (bias).
Letters: B batch  T length  E experts  K choices of a token  G groups  N options of a level.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

# Scales the gradient of the router's bias: far below what shows in a gradient norm, far above the smallest float32.
_BIAS_GRADIENT = 2.0**-64


ROW_LOSSES = ("load_balance", "router_z", "router_importance", "router_entropy")  # one value a row of the batch


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  name: str  # of ROUTERS
  experts_per_token: int
  normalize: bool  # the gates of a token sum to 1
  multiplier: float  # of the gates
  has_bias: bool
  group_sizes: tuple[int, ...]  # experts of each group, in order; empty without groups


class Logits(NamedTuple):
  """What a router projects a token to; `groups` is None where there are none."""

  experts: Float[Array, "B T E"]
  groups: Float[Array, "B T G"] | None = None


class Level(NamedTuple):
  """One decision of a router, with two options or more.

  Attributes:
    logits: of the options, raw.
    probabilities: of the options.
    weights: how much each token counts here: the probability that it comes to decide this.
    members: the experts behind each option; an even share of the tokens is in proportion to their number.
  """

  logits: Float[Array, "B T N"]
  probabilities: Float[Array, "B T N"]
  weights: Float[Array, "B T"]
  members: Bool[np.ndarray, "N E"]


class Routing(NamedTuple):
  """The chosen experts of each token, best first, their gates, and the levels of the router without its noise."""

  choices: Int[Array, "B T K"]
  gates: Float[Array, "B T K"]
  levels: tuple[Level, ...]


def _softmax(logits: Logits, group_sizes: tuple[int, ...]) -> tuple[Float[Array, "B T E"], tuple[Level, ...]]:
  scores = jax.nn.softmax(logits.experts, axis=-1)
  return scores, _flat(logits, scores)


def _sigmoid(logits: Logits, group_sizes: tuple[int, ...]) -> tuple[Float[Array, "B T E"], tuple[Level, ...]]:
  """Returns every expert's score by itself. In the losses, a probability is a share of all scores."""
  scores = jax.nn.sigmoid(logits.experts)
  return scores, _flat(logits, scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20))


def _flat(logits: Logits, probabilities: Float[Array, "B T E"]) -> tuple[Level, ...]:
  E = probabilities.shape[-1]
  everywhere = jnp.ones(probabilities.shape[:-1])
  return (Level(logits.experts, probabilities, everywhere, np.eye(E, dtype=bool)),) if E > 1 else ()


def _grouped(logits: Logits, group_sizes: tuple[int, ...]) -> tuple[Float[Array, "B T E"], tuple[Level, ...]]:
  """Returns p(group) p(expert | group). A group's softmax starts from its size: logits of 0 make all experts equal."""
  sizes = np.array(group_sizes)
  group = jax.nn.softmax(logits.groups + np.log(sizes, dtype=np.float32), axis=-1)
  member = np.eye(sizes.sum(), dtype=bool)
  levels = []
  if len(sizes) > 1:
    members = np.repeat(np.eye(len(sizes), dtype=bool), sizes, axis=1)
    levels.append(Level(logits.groups, group, jnp.ones(group.shape[:-1]), members))
  scores, first = [], 0
  for index, size in enumerate(group_sizes):
    inside = logits.experts[..., first : first + size]
    expert = jax.nn.softmax(inside, axis=-1)
    scores.append(group[..., index, None] * expert)
    if size > 1:
      weights = jax.lax.stop_gradient(group[..., index])
      levels.append(Level(inside, expert, weights, member[first : first + size]))
    first += size
  return jnp.concatenate(scores, axis=-1), tuple(levels)


# Name -> (logits, sizes of the groups) -> scores of the experts, and the levels behind them.
ROUTERS: dict[str, Callable[[Logits, tuple[int, ...]], tuple[Float[Array, "B T E"], tuple[Level, ...]]]] = {
  "softmax": _softmax,
  "sigmoid": _sigmoid,
  "grouped": _grouped,
}


def route(logits: Logits, noise: Logits | None, bias: Float[Array, " E"] | None, config: RouterConfig) -> Routing:
  """Returns the routing. The choice is by score + bias, a gate is the score without it; `noise` is added to logits."""
  score = ROUTERS[config.name]
  scores, levels = score(logits, config.group_sizes)
  if noise is not None:
    scores, _ = score(jax.tree.map(jnp.add, logits, noise), config.group_sizes)
  _, choices = jax.lax.top_k(scores if bias is None else scores + bias, config.experts_per_token)
  gates = jnp.take_along_axis(scores, choices, axis=-1)
  if config.normalize:
    gates /= jnp.sum(gates, axis=-1, keepdims=True) + 1e-20
  if config.multiplier != 1:
    gates *= config.multiplier
  return Routing(choices, gates, levels)


def noise_deviation(first: float, steps: int, step: Int[Array, ""]) -> Float[Array, ""]:
  """Returns the standard deviation of the noise at optimizer step `step`: `first`, and 0 after `steps`; 0: it stays."""
  if not steps:
    return jnp.full((), first, jnp.float32)
  return first * jnp.maximum(1 - step / jnp.float32(steps), 0)


def draw_noise(logits: Logits, deviation: Float[Array, ""], key: Key[Array, ""]) -> Logits:
  """Returns Gaussian noise for every logit."""
  leaves, tree = jax.tree.flatten(logits)
  keys = jax.random.split(key, len(leaves))
  noise = [deviation * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(tree, noise)


def routing_losses(routing: Routing, is_token: Bool[Array, "B T"], num_experts: int) -> dict[str, Array]:
  """Returns what a router loses, for each row [B] and as the mean over its levels, and sums over tokens [E].

  Those are load, counts of choices, and probability, which a router in groups has not.

  A share is `even` if it is in proportion to an option's experts.

  load_balance: sum of load share x mean probability / even; 1 when even.
  router_z: mean logsumexp(raw logits)^2.
  router_importance: square of the coefficient of variation of the summed probabilities / even.
  router_entropy: 1 - entropy of a token's probabilities / its maximum, taken relative to the even ones.
  """
  token = is_token.astype(jnp.float32)
  load = jnp.sum(jax.nn.one_hot(routing.choices, num_experts) * token[..., None, None], axis=(1, 2))
  losses = [_level_losses(level, load, token) for level in routing.levels]
  zero = jnp.zeros(load.shape[0])
  means = (
    [sum(values, zero) / len(losses) for values in zip(*losses, strict=True)] if losses else [zero] * len(ROW_LOSSES)
  )
  sums = {"load": load.sum(axis=0)}
  if len(routing.levels) == 1 and routing.levels[0].probabilities.shape[-1] == num_experts:
    sums["probability"] = jnp.einsum("bte,bt->e", routing.levels[0].probabilities, token)
  return dict(zip(ROW_LOSSES, means, strict=True)) | sums


def _level_losses(
  level: Level, load: Float[Array, "B E"], token: Float[Array, "B T"]
) -> tuple[Float[Array, " B"], ...]:
  num_members = level.members.sum(axis=1)
  even = (num_members / num_members.sum()).astype(np.float32)
  weights = token * level.weights
  # Tokens that never come here, or padding, must not divide by 0.
  weights /= jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-20)
  counts = jnp.einsum("be,ne->bn", load, level.members.astype(np.float32))
  count = jnp.sum(counts, axis=1, keepdims=True)
  share = jnp.where(count > 0, counts / jnp.maximum(count, 1), even)
  probability = jnp.einsum("btn,bt->bn", level.probabilities, weights)
  load_balance = jnp.sum(share * probability / even, axis=-1)
  router_z = jnp.sum(jnp.square(jax.nn.logsumexp(level.logits, axis=-1)) * weights, axis=1)
  importance = jnp.sum(jnp.square(probability - even) / even, axis=-1)
  logs = jnp.log(jnp.maximum(level.probabilities, 1e-20) / even)
  divergence = jnp.sum(jnp.sum(level.probabilities * logs, axis=-1) * weights, axis=1)
  return load_balance, router_z, importance, divergence / -np.log(even.min())


def bias_step(bias: Float[Array, " E"], load: Float[Array, " E"]) -> Float[Array, ""]:
  """Returns 0, with a gradient for `bias` of the sign of load - mean load and of no size that counts.

  As part of a summed loss it gathers the load of micro-batches and devices without error: times E, loads and their mean
  are whole numbers. The optimizer moves the bias against the sign.
  """
  excess = jax.lax.stop_gradient(load.size * load - jnp.sum(load))
  return _BIAS_GRADIENT * jnp.sum((bias - jax.lax.stop_gradient(bias)) * excess)
