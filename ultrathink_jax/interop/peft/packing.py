"""Adapters of matrices that are one tensor there and several here, or a bank there: joined, split and packed.

Letters: E experts  r rank  R rank of the joined adapter; in, out: dims of a matrix.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ultrathink_jax.errors import ConfigError
from ultrathink_jax.interop.peft.adapter import alpha_of, scale_of
from ultrathink_jax.lora.named import NamedAdapter


def pack_bank(
  a: Float[np.ndarray, "E in r"], b: Float[np.ndarray, "E r out"]
) -> tuple[Float[np.ndarray, "Er in"], Float[np.ndarray, "out rE"]]:
  """Returns lora_A, in which the expert varies slowest, and lora_B, in which it varies fastest."""
  return a.swapaxes(1, 2).reshape(-1, a.shape[1]), b.transpose(2, 1, 0).reshape(b.shape[2], -1)


def unpack_bank(
  lora_a: Float[np.ndarray, "Er in"], lora_b: Float[np.ndarray, "out rE"], num_experts: int
) -> tuple[Float[np.ndarray, "E in r"], Float[np.ndarray, "E r out"]]:
  """Returns what `pack_bank` packed."""
  a = lora_a.reshape(num_experts, -1, lora_a.shape[1]).swapaxes(1, 2)
  return a, lora_b.reshape(lora_b.shape[0], -1, num_experts).transpose(2, 1, 0)


def join(parts: dict[str, NamedAdapter | None], out_dims: Sequence[int], is_rslora: bool) -> NamedAdapter:
  """Returns one adapter of the matrix whose columns are those of all parts; some have none.

  Parts with the same a share it. Otherwise R is the sum of the ranks: a is all of theirs, b is theirs on the diagonal;
  where scales differ, b takes up the difference.

  Raises:
    ConfigError: some parts have a magnitude and others not: a column without an adapter would need its norm.
  """
  present = [part for part in parts.values() if part is not None]
  first = present[0]
  if len(parts) == 1:
    return first
  magnitudes = [part.magnitude if part else None for part in parts.values()]
  has_magnitude = any(magnitude is not None for magnitude in magnitudes)
  if has_magnitude and any(magnitude is None for magnitude in magnitudes):
    lacking = [name for name, part in parts.items() if part is None or part.magnitude is None]
    raise ConfigError(f"{', '.join(lacking)}: no DoRA magnitude, and the parts of one matrix have it all or none")
  is_shared = all(part.alpha == first.alpha and np.array_equal(part.a, first.a) for part in present)
  rank = first.rank if is_shared else sum(part.rank for part in present)
  scale = scale_of(first.alpha, first.rank, is_rslora)
  b = np.zeros((*first.b.shape[:-2], rank, sum(out_dims)), np.float32)
  row = column = 0
  for part, width in zip(parts.values(), out_dims, strict=True):
    if part is not None:
      ratio = scale_of(part.alpha, part.rank, is_rslora) / scale
      b[..., row : row + part.rank, column : column + width] = part.b if ratio == 1 else np.float32(ratio) * part.b
      row += 0 if is_shared else part.rank
    column += width
  a = first.a if is_shared else np.concatenate([part.a for part in present], -1)
  alpha = first.alpha if is_shared else alpha_of(scale, rank, is_rslora)
  return NamedAdapter(a, b, alpha, np.concatenate(magnitudes) if has_magnitude else None)


def split(whole: NamedAdapter, out_dims: Sequence[int], is_rslora: bool) -> list[NamedAdapter | None]:
  """Returns the adapter of each part of a matrix's columns, None for a part that it leaves as it is.

  Ranks that only one part reads are that part's own; where parts read the same rank, each gets all of a.
  """
  if len(out_dims) == 1:
    return [whole]
  stops = np.cumsum(out_dims)[:-1]
  columns = np.split(whole.b, stops, -1)
  magnitudes = [None] * len(columns) if whole.magnitude is None else np.split(whole.magnitude, stops)
  reads = np.stack([np.any(b != 0, axis=(*range(b.ndim - 2), b.ndim - 1)) for b in columns])  # [parts, R]
  owns = np.broadcast_to(True, reads.shape)
  is_block_diagonal = reads.any() and reads.sum(0).max() == 1
  if is_block_diagonal and (whole.magnitude is None or reads.any(1).all()):
    owner = reads.argmax(0)
    for rank in np.flatnonzero(~reads.any(0)):  # what no part reads goes with the rank before it
      owner[rank] = owner[rank - 1] if rank else owner[np.flatnonzero(reads.any(0))[0]]
    owns = owner == np.arange(len(columns))[:, None]
  elif whole.magnitude is None and reads.any():
    owns = owns & reads.any(1)[:, None]
  scale = scale_of(whole.alpha, whole.rank, is_rslora)
  parts: list[NamedAdapter | None] = []
  for own, b, magnitude in zip(owns, columns, magnitudes, strict=True):
    rank = int(own.sum())
    alpha = whole.alpha if rank == whole.rank else alpha_of(scale, rank, is_rslora)
    parts.append(NamedAdapter(whole.a[..., own], b[..., own, :], alpha, magnitude) if rank else None)
  return parts
