"""The environment that measurements run in, and how a page of results names it."""

import datetime
import os
import platform
import re
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from ultrathink_jax import main
from ultrathink_jax.parallel.devices import configure_jax

RESULTS = Path(__file__).parent / "results"


def use_product_settings() -> None:
  """Gives processes started from here on the environment that `ultrathink_jax.main.console` gives itself.

  Peers are started with it too: they gain as much by it. Compilations are not kept, so that their time can be told.
  """
  os.environ |= main.allocator_settings()
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"


def restart_with_product_settings() -> None:
  """Begins this program anew with allocator settings, where it does not have them yet and the system offers them."""
  is_new = bool(main.allocator_settings())
  use_product_settings()
  if is_new:
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
  configure_jax()


def num_cores() -> int:
  return len(os.sched_getaffinity(0))


def cpu_name() -> str:
  """Returns for example "Intel(R) Xeon(R) Processor, 2 cores"."""
  lines = Path("/proc/cpuinfo").read_text().splitlines()
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return f"{names[0] if names else platform.machine()}, {num_cores()} cores"


def versions(*packages: str) -> str:
  """Returns the versions of Python and of those packages that are installed."""
  found = [f"Python {platform.python_version()}"]
  for package in packages:
    try:
      found.append(f"{package} {metadata.version(package)}")
    except metadata.PackageNotFoundError:
      found.append(f"no {package}")
  return ", ".join(found)


def spread(values: Sequence[float]) -> str:
  """Returns "median (lowest - highest)"."""
  return f"{statistics.median(values):,.0f} ({min(values):,.0f} - {max(values):,.0f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write_page(name: str, hardware: str, page: str, folder: Path = RESULTS) -> Path:
  """Writes `page` below the command that made it as NAME_HARDWARE_DATE.md and returns its path."""
  slug = lambda text: re.sub(r"[^a-z0-9.]+", "_", text.replace("(R)", "").lower()).strip("_")
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f"{slug(name)}_{slug(hardware)}_{datetime.date.today():%Y%m%d}.md"
  command = " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
  path.write_text(f"# {name}\n\n    {command}\n\n{page}\n")
  return path
