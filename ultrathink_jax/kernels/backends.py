"""Which form of each kernel a model runs: the names of `model.*_backend`, and what `auto` means where.

Accelerator forms are imported when they are first run, so that importing this costs nothing.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.kernels.attention import Scoring, attention
from ultrathink_jax.kernels.attention_blockwise import attention_blockwise
from ultrathink_jax.kernels.experts import experts
from ultrathink_jax.kernels.experts_loop import experts_loop
from ultrathink_jax.kernels.experts_sorted import experts_sorted
from ultrathink_jax.kernels.ssd import ssd
from ultrathink_jax.kernels.ssd_chunked import ssd_chunked
from ultrathink_jax.platform import target_platform


def _lazy(name: str) -> Callable[..., Any]:
  def run(*args: Any, **kwargs: Any) -> Any:
    return getattr(importlib.import_module(f"ultrathink_jax.kernels.{name}"), name)(*args, **kwargs)

  return run


ATTENTION: dict[str, Callable[..., Any]] = {
  "reference": attention,
  "blockwise": attention_blockwise,
  "pallas": _lazy("attention_pallas"),
  "cudnn": _lazy("attention_cudnn"),
}
SSD: dict[str, Callable[..., Any]] = {"reference": ssd, "chunked": ssd_chunked, "pallas": _lazy("ssd_pallas")}
EXPERTS: dict[str, Callable[..., Any]] = {
  "reference": experts,
  "loop": experts_loop,
  "sorted": experts_sorted,
  "capacity": experts_sorted,  # which holds [experts, capacity] rows wherever there is a capacity
  "pallas": _lazy("experts_pallas"),
  "tokamax": _lazy("experts_tokamax"),
}

_CUDNN_COMPUTE_CAPABILITY = 9.0  # from which cuDNN reads packed rows
_CUDNN_HEAD_DIM = 256  # the most, from that capability on


def resolve_attention(
  name: str, scoring: Scoring, has_sinks: bool, dtype: Any = "bfloat16", head_dim: int | None = None
) -> str:
  """Returns the backend that `name` stands for here.

  auto is cuDNN where it can be, the Pallas kernels on other accelerators, which know every scoring.

  Raises:
    ConfigError: this platform, or this kind of attention, is beyond the backend.
  """
  if name not in ("auto", "cudnn"):
    return name
  hindrance = _cudnn_hindrance(scoring, has_sinks, dtype, head_dim)
  if hindrance is None:
    return "cudnn"
  if name == "cudnn":
    raise ConfigError(f"model.attention_backend='cudnn' {hindrance}; choose 'auto' or 'pallas'")
  return {"gpu": "pallas", "tpu": "pallas"}.get(target_platform(), "blockwise")


def _cudnn_hindrance(scoring: Scoring, has_sinks: bool, dtype: Any, head_dim: int | None) -> str | None:
  """Returns why cuDNN cannot attend so here."""
  platform = target_platform()
  capability = float(getattr(jax.devices()[0], "compute_capability", 0)) if platform == "gpu" else 0.0
  for is_wrong, what in (
    (platform != "gpu", f"runs on NVIDIA GPUs and this is a {platform}"),
    (
      capability < _CUDNN_COMPUTE_CAPABILITY,
      f"needs compute capability {_CUDNN_COMPUTE_CAPABILITY} for packed rows and this GPU has {capability}",
    ),
    (scoring.soft_cap is not None, f"has no soft cap and model.attention_soft_cap={scoring.soft_cap}"),
    (has_sinks, "has no sinks and model.attention_sinks=True"),
    (str(dtype) not in ("bfloat16", "float16"), f"multiplies 16-bit numbers and model.dtype={str(dtype)!r}"),
    (
      head_dim is not None and (head_dim % 8 or head_dim > _CUDNN_HEAD_DIM),
      f"needs a head_dim that is a multiple of 8 up to {_CUDNN_HEAD_DIM} and has model.head_dim={head_dim}",
    ),
  ):
    if is_wrong:
      return what
  return None


def resolve_ssd(name: str) -> str:
  """Returns the backend that `name` stands for here."""
  if name == "auto":
    return {"gpu": "pallas", "tpu": "pallas"}.get(target_platform(), "chunked")
  return name


def resolve_experts(name: str, capacity: float | None) -> str:
  """Returns the backend that `name` stands for here, with a `capacity` (rows, or a factor of them) or without (None).

  Raises:
    ConfigError: the backend needs a capacity, or a package that is not installed.
  """
  if name == "auto":
    if target_platform() not in ("gpu", "tpu"):
      return "loop"
    return "capacity" if capacity else "pallas"
  if name == "capacity" and not capacity:
    raise ConfigError(
      "model.experts_backend='capacity' holds a fixed number of rows an expert and model.capacity_factor=0 sets none; "
      "choose a capacity_factor above 0, such as 1.25, or another backend"
    )
  if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
    raise ConfigError(
      "model.experts_backend='tokamax' needs the package tokamax, which is not installed; "
      "run pip install tokamax or choose 'pallas'"
    )
  return name


def describe(model: ModelConfig) -> dict[str, str]:
  """Returns the backend of each letter of the model's pattern that has a choice of them.

  Raises:
    ConfigError: as resolving each raises.
  """
  scoring = Scoring(1.0, model.attention_soft_cap or None)
  attend = lambda: resolve_attention(
    model.attention_backend, scoring, model.attention_sinks, model.dtype, model.head_dim
  )
  resolve = {
    "A": attend,
    "L": attend,
    "M": lambda: resolve_ssd(model.ssd_backend),
    "E": lambda: resolve_experts(model.experts_backend, model.capacity_factor or None),
  }
  return {letter: resolved() for letter, resolved in resolve.items() if letter in model.layers}
