"""What the devices of this process are, hold and prefer. Platform tests live here and in kernels/ only."""

import dataclasses

import jax
import psutil


@dataclasses.dataclass(frozen=True)
class Devices:
  """The accelerators, or the CPU, that a run uses."""

  platform: str
  kind: str
  count: int
  memory_bytes: int  # that one device can still give to a run


def describe_devices() -> Devices:
  """Returns what jax.devices() are. Virtual CPU devices share the memory of the machine evenly."""
  devices = jax.devices()
  first = devices[0]
  stats = first.memory_stats() if first.platform != "cpu" else None
  if stats and "bytes_limit" in stats:
    memory_bytes = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  else:
    memory_bytes = psutil.virtual_memory().available // max(1, len(jax.local_devices()))
  return Devices(first.platform, first.device_kind, len(devices), memory_bytes)


def peak_memory_bytes() -> int:
  """Returns the most memory the first local device has held; on CPU, that this process has."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"]
  with open("/proc/self/status") as status:
    peak = [line for line in status if line.startswith("VmHWM")]
  return int(peak[0].split()[1]) * 1024 if peak else psutil.Process().memory_info().rss


def compiler_options() -> dict[str, bool | str]:
  """Returns XLA options that make a train step faster on this backend.

  On CPU: XLA's own matrix products and loops instead of YNNPACK fusions, whose products took twice as long inside a
  step and whose sums over a middle dim of six-dimensional arrays dominated it; and maxima that need not carry NaN
  (sums still do).
  """
  if jax.default_backend() == "cpu":
    return {"xla_cpu_experimental_ynn_fusion_type": "", "xla_cpu_enable_fast_min_max": True}
  return {}


def scan_unroll(repeats: int) -> int:
  """Returns how many periods to write out per scan iteration: a CPU loses a fifth to the loop, others compile less."""
  return repeats if jax.default_backend() == "cpu" else 1
