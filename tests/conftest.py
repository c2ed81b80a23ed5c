"""Checks shapes of every annotated function, and small models that tests share."""

import os
import signal
import tempfile

# Eight virtual devices for meshes; unoptimised machine code, because tests spend their time compiling.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")

# Programs that tests start share their compilations, and leave nothing in the user's cache.
os.environ.setdefault("ULTRATHINK_CACHE_DIR", os.path.join(tempfile.gettempdir(), "ultrathink_jax_tests"))

# What a shell starts in the background ignores interrupts, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

import jaxtyping

jaxtyping.install_import_hook("ultrathink_jax", "beartype.beartype")

import dataclasses

import hypothesis
import jax.numpy as jnp

from configs import base
from ultrathink_jax.config import Config, ModelConfig, from_mapping
from ultrathink_jax.types import Context

hypothesis.settings.register_profile("tests", deadline=None, database=None)  # machines may be busy
hypothesis.settings.load_profile("tests")


def tiny_model(**changes) -> ModelConfig:
  """Returns a float32 model of a few thousand parameters."""
  model = base.get_config().model.to_dict()
  model |= {
    "layers": "MAFEL",
    "vocab_size": 64,
    "embed_dim": 32,
    "dtype": "float32",
    "remat": "none",
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "window_tokens": 5,
    "mlp_dim": 48,
    "num_experts": 4,
    "expert_dim": 24,
    "mamba_state_dim": 8,
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
    "mamba_chunk_tokens": 8,
  }
  return from_mapping(model | changes, ModelConfig, "model.")


def tiny_config(**sections) -> Config:
  """Returns a whole configuration of a tiny run; keywords override keys of sections."""
  config = from_mapping(base.get_config().to_dict())
  config = dataclasses.replace(config, model=tiny_model())
  for section, changes in sections.items():
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
  return config


def packed_context(*documents: int, batch: int = 1) -> Context:
  """Returns rows that hold documents of the given lengths one after another; a negative length is padding."""
  positions = jnp.concatenate([jnp.arange(abs(n), dtype=jnp.int32) for n in documents])
  segments = jnp.concatenate([jnp.full(abs(n), i + 1 if n > 0 else 0, jnp.int32) for i, n in enumerate(documents)])
  return Context(jnp.tile(positions, (batch, 1)), jnp.tile(segments, (batch, 1)))
