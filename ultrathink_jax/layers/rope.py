"""Rotary position embedding, half-split form, and the ways to stretch it over longer contexts.

Source: arXiv:2104.09864; linear arXiv:2306.15595, dynamic NTK arXiv:2309.16039 section 3.1 and its reading in common
use, YaRN arXiv:2309.00071, Llama 3 arXiv:2407.21783.
Letters: B batch  T length  N heads  H head dim  R pairs of dims that turn.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ultrathink_jax.config import RopeConfig
from ultrathink_jax.types import Rotation


def rotation(positions: Int[Array, "B T"], head_dim: int, rope: RopeConfig) -> Rotation:
  """Returns the rotation of heads of `head_dim`; 2 R = rope.fraction * head_dim, angles are float32.

  Dynamic scaling follows the longest document of each row: rows no longer than rope.original_tokens are as without it,
  tokens in longer ones turn more slowly the longer it is.
  """
  frequencies, magnitude = _frequencies(positions, int(head_dim * rope.fraction) // 2, rope)
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  return Rotation(jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude)


@jax.custom_vjp
def rotate(x: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
  """Returns x with dims (j, j + R) of each head turned by their angle; the dims behind stay as they are.

  Gradients are turned back. None reaches the rotation itself.
  """
  cos, sin = rotation
  pairs = cos.shape[-1]
  first, second = x[..., :pairs].astype(jnp.float32), x[..., pairs : 2 * pairs].astype(jnp.float32)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate([*(part.astype(x.dtype) for part in turned), x[..., 2 * pairs :]], axis=-1)


def _rotate_forward(x, rotation):
  return rotate(x, rotation), rotation


def _rotate_backward(rotation, gradient):
  return rotate(gradient, Rotation(rotation.cos, -rotation.sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)


def _frequencies(positions: Int[Array, "B T"], pairs: int, rope: RopeConfig) -> tuple[Array | np.ndarray, float]:
  """Returns radians per token, broadcastable to [B, T, 1, R], and what cosines and sines are multiplied by."""
  exponents = np.arange(pairs) / pairs
  plain = rope.theta**-exponents
  if rope.scaling == "linear":
    return _constant(plain / rope.factor), 1.0
  if rope.scaling == "llama3":
    return _constant(_llama3(plain, rope)), 1.0
  if rope.scaling == "yarn":
    return _constant(_yarn(plain, rope)), rope.attention_factor or 0.1 * math.log(rope.factor) + 1
  if rope.scaling == "dynamic":
    length = jnp.maximum(jnp.max(positions, axis=1) + 1, rope.original_tokens).astype(jnp.float32)
    stretch = rope.factor * length / rope.original_tokens - (rope.factor - 1)
    theta = rope.theta * stretch ** (pairs / max(1, pairs - 1))
    return theta[:, None, None, None] ** -jnp.asarray(exponents, jnp.float32), 1.0
  return _constant(plain), 1.0


def _constant(frequencies: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
  return frequencies.astype(np.float32)


def _llama3(plain: Float[np.ndarray, " R"], rope: RopeConfig) -> Float[np.ndarray, " R"]:
  """Returns slow frequencies divided by the factor, fast ones as they are, and a blend between."""
  turns = rope.original_tokens * plain / (2 * math.pi)
  low, high = rope.low_frequency_factor, rope.high_frequency_factor
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return kept * plain + (1 - kept) * plain / rope.factor


def _yarn(plain: Float[np.ndarray, " R"], rope: RopeConfig) -> Float[np.ndarray, " R"]:
  """Returns a blend by dim: between the dims that turn beta_fast and beta_slow times over the original context."""
  pairs = plain.size
  dim_of = lambda turns: pairs * math.log(rope.original_tokens / (turns * 2 * math.pi)) / math.log(rope.theta)
  low = max(math.floor(dim_of(rope.beta_fast)), 0)
  high = min(math.ceil(dim_of(rope.beta_slow)), 2 * pairs - 1)
  scaled = np.clip((np.arange(pairs) - low) / max(high - low, 0.001), 0, 1)
  return (1 - scaled) * plain + scaled * plain / rope.factor
