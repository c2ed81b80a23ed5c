"""What the devices of this process are, hold and prefer. Platform tests live here and in kernels/ only."""

import contextlib
import dataclasses
import os
from pathlib import Path

import jax
import psutil

from ultrathink_jax.parallel.processes import num_on_this_machine
from ultrathink_jax.platform import target_platform


@dataclasses.dataclass(frozen=True)
class Devices:
  """The accelerators, or the CPU, that a run uses."""

  platform: str
  kind: str
  count: int
  memory_bytes: int  # that one device can still give to a run


def describe_devices() -> Devices:
  """Returns what the devices of all processes are. Virtual CPU devices share the memory of their machine evenly."""
  first = jax.local_devices()[0]
  stats = first.memory_stats() if first.platform != "cpu" else None
  if stats and "bytes_limit" in stats:
    memory_bytes = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  else:
    memory_bytes = psutil.virtual_memory().available // (len(jax.local_devices()) * num_on_this_machine())
  return Devices(first.platform, first.device_kind, jax.device_count(), memory_bytes)


def peak_memory_bytes() -> int:
  """Returns the most memory the first local device has held; on CPU, that this process has."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"]
  with open("/proc/self/status") as status:
    peak = [line for line in status if line.startswith("VmHWM")]
  return int(peak[0].split()[1]) * 1024 if peak else psutil.Process().memory_info().rss


def memory_in_use_bytes() -> int:
  """Returns what the first local device holds now; on CPU, what this process does."""
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_in_use" in stats:
    return stats["bytes_in_use"]
  return psutil.Process().memory_info().rss


def configure_jax() -> None:
  """Sets JAX up for a program of its own, before it looks for devices.

  Compiled programs are kept on disk, so that the same program compiles once per machine: where JAX is told to
  (JAX_COMPILATION_CACHE_DIR), else in ULTRATHINK_CACHE_DIR or ~/.cache/ultrathink_jax, if that can be written.
  JAX_ENABLE_COMPILATION_CACHE=0 turns it off. On CPU steps run in the thread that calls them: another thread's memory
  goes back to the system after each.
  """
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  if jax.config.jax_compilation_cache_dir is not None:
    return
  directory = Path(os.environ.get("ULTRATHINK_CACHE_DIR", "~/.cache/ultrathink_jax")).expanduser() / "compiled"
  with contextlib.suppress(OSError):
    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory))


def compiler_options(dtype: str, is_deterministic: bool = False) -> dict[str, bool | str]:
  """Returns XLA options that make a train step with activations of `dtype` faster on this backend.

  On CPU: maxima that need not carry NaN (sums still do), and XLA's own loops instead of YNNPACK fusions, whose sums
  over a middle dim of six-dimensional arrays dominated a step. bfloat16 products are YNNPACK's: nothing else reaches
  the processor's units for them. float32 products are too where there is AVX-512 and no AMX (Zen 4), since XLA's own
  run at half or a third of the speed with few rows and a transposed right operand; with AMX, XLA's were faster.
  On TPU: exchanges of experts' rows and gathers of weights that run beside products. On GPU: no operation whose sums
  depend on the order of threads, if it is to be deterministic, which the others are anyway.
  """
  if target_platform() == "tpu":
    fusion = "xla_tpu_enable_async_collective_fusion"
    options = (fusion, f"{fusion}_fuse_all_gather", f"{fusion}_multiple_steps", "xla_enable_async_all_gather")
    return dict.fromkeys((*options, "xla_tpu_enable_async_all_to_all"), "true")
  if target_platform() == "gpu":
    return {"xla_gpu_deterministic_ops": True} if is_deterministic else {}
  fusions = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT" if dtype == "bfloat16" or _has_avx512_alone() else ""
  return {"xla_cpu_experimental_ynn_fusion_type": fusions, "xla_cpu_enable_fast_min_max": True}


def _has_avx512_alone() -> bool:
  """Returns whether this processor has AVX-512 but no matrix units (AMX)."""
  cpuinfo = Path("/proc/cpuinfo")
  flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
  return "avx512f" in flags and "amx_tile" not in flags


def scan_unroll(repeats: int) -> int:
  """Returns how many periods to write out per scan iteration: a CPU loses a fifth to the loop, others compile less."""
  return repeats if target_platform() == "cpu" else 1
