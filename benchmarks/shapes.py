"""The models that speed is measured on: sizes, and what their blocks are made of.

The same `ModelConfig` makes ours and, through benchmarks/peers.py, the peer's model, so sizes are stated once.

| kind   | a block                                                          | peer                |
|--------|------------------------------------------------------------------|---------------------|
| dense  | attention, SwiGLU feed-forward                                   | LlamaForCausalLM    |
| moe    | attention, 8 experts of the feed-forward's width, 2 chosen       | MixtralForCausalLM  |
| mamba  | Mamba-2 and nothing else                                         | Mamba2ForCausalLM   |
| hybrid | Mamba-2 or, in every third block, attention; then a feed-forward | BambaForCausalLM    |
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from configs import base, ultra3b
from ultrathink_jax.config import Config, from_mapping


class Size(NamedTuple):
  """Widths of a model and the batch it is measured with, for whatever kind of blocks."""

  embed_dim: int
  blocks: int
  num_heads: int
  num_kv_heads: int
  mlp_dim: int
  vocab_size: int
  is_tied: bool  # the embedding is also the output projection
  batch_size: int  # sequences
  sequence_length: int  # tokens


SIZES = {
  "tiny": Size(256, 4, 4, 2, 768, 8192, False, 8, 256),
  "small": Size(512, 6, 8, 4, 2048, 50257, False, 4, 256),
  # For one GPU of 80 GB or more.
  "350m": Size(1024, 24, 16, 8, 3072, 50304, True, 16, 2048),
  "1.3b": Size(2048, 32, 32, 8, 4352, 50304, True, 8, 2048),
  "1b_active": Size(2048, 16, 16, 8, 2816, 50304, False, 8, 2048),  # as moe: 2.6B parameters, 0.96B active
}


def _hybrid(blocks: int) -> str:
  """Returns every third block with attention, the others with Mamba-2."""
  periods, rest = divmod(blocks, 3)
  return f"(MFMFAF)x{periods}" * bool(periods) + "MF" * rest


PATTERNS: dict[str, Callable[[int], str]] = {
  "dense": lambda blocks: f"(AF)x{blocks}",
  "moe": lambda blocks: f"(AE)x{blocks}",
  "mamba": lambda blocks: f"(M)x{blocks}",
  "hybrid": _hybrid,
}
SHAPES = (*SIZES, "ultra3b")
_SMALL = ("tiny", "small")


def make_config(shape: str, kind: str, dtype: str) -> Config:
  """Returns the configuration of a run with one of SHAPES.

  On one GPU the backward pass finds the results of products and kernels again (remat "dots"); of the small shapes,
  everything. `ultra3b` is configs/ultra3b.py at rows of 8k tokens, and has a pattern of its own whatever the `kind`.
  """
  if shape == "ultra3b":
    config = ultra3b.get_config()
    config.train.update(batch_size=2, accumulation_steps=1)
    config.model.update(dtype=dtype, remat="dots")
    return from_mapping(config.to_dict())
  size = SIZES[shape]
  config = base.get_config()
  config.model.update(
    layers=PATTERNS[kind](size.blocks),
    vocab_size=size.vocab_size,
    embed_dim=size.embed_dim,
    tie_embeddings=size.is_tied,
    dtype=dtype,
    remat="none" if shape in _SMALL else "dots",
    num_heads=size.num_heads,
    num_kv_heads=size.num_kv_heads,
    head_dim=size.embed_dim // size.num_heads,
    mlp_dim=size.mlp_dim,
    num_experts=8,
    experts_per_token=2,
    expert_dim=size.mlp_dim,
    capacity_factor=0.0,
    mamba_expand=2,
    mamba_head_dim=64,
    mamba_state_dim=64,
    mamba_chunk_tokens=64,
  )
  if kind == "hybrid":
    config.model.rope.fraction = 0.5  # Bamba turns half of a head's dims
  config.train.update(batch_size=size.batch_size, sequence_length=size.sequence_length)
  return from_mapping(config.to_dict())


def with_batch(config: Config, batch_size: int | None = None, sequence_length: int | None = None) -> Config:
  """Returns `config` with another batch where one is given."""
  train = dataclasses.replace(
    config.train,
    batch_size=batch_size or config.train.batch_size,
    sequence_length=sequence_length or config.train.sequence_length,
  )
  return dataclasses.replace(config, train=train)


def random_tokens(config: Config) -> np.ndarray:
  """Returns [B, T] token numbers; every contestant trains on the same."""
  shape = (config.train.batch_size, config.train.sequence_length)
  return np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
