"""Which platform programs are compiled for: the one JAX runs on, unless a plan is made for another."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_target: ContextVar[str | None] = ContextVar("target", default=None)


def target_platform() -> str:
  """Returns "cpu", "gpu" or "tpu"."""
  return _target.get() or jax.default_backend()


def is_one_cpu() -> bool:
  """Returns whether what is traced now runs on a CPU that is one device: forms that cut across dims are for that."""
  return target_platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
  """Makes `platform` the target of what is traced inside."""
  token = _target.set(platform)
  try:
    yield
  finally:
    _target.reset(token)
