"""The facts of a run: what it is, what it runs on, what it reads."""

import platform
import shlex
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from ultrathink_jax import __version__
from ultrathink_jax.config import Config
from ultrathink_jax.data.prepare import PreparedData
from ultrathink_jax.data.token_store import SPLITS
from ultrathink_jax.kernels import backends
from ultrathink_jax.lora.coverage import flops_per_token
from ultrathink_jax.models.counts import count_model
from ultrathink_jax.models.stack import bubble_of
from ultrathink_jax.parallel.devices import Devices
from ultrathink_jax.parallel.processes import num_processes
from ultrathink_jax.train.plan import Plan


def run_facts(config: Config, workdir: Path, devices: Devices, plan: Plan, argv: list[str]) -> dict[str, Any]:
  """Returns what is known of a run before it begins, as run.json holds it."""
  count = count_model(config.model)
  rows = config.train.micro_batch_size
  return {
    "name": workdir.name,
    "command": shlex.join(["python", "-m", "ultrathink_jax.main", *argv[1:]]),
    "model": {
      "layers": config.model.layers,
      "parameters_total": count.total,
      "parameters_active": count.active,
      "flops_per_token": flops_per_token(config, count),
    },
    "device": {"kind": devices.kind, "count": devices.count, "platform": devices.platform},
    "processes": num_processes(),
    "versions": {
      "ultrathink_jax": __version__,
      "jax": jax.__version__,
      "flax": version("flax"),
      "python": platform.python_version(),
    },
    "steps": config.train.steps,
    "accumulation_steps": config.train.accumulation_steps,
    "kernels": backends.describe(config.model),
    "mesh": dict(plan.mesh.shape),
    "pipeline_bubble": bubble_of(config.model, rows, plan.mesh.shape),
    "memory": {"need_bytes": plan.need.total, "have_bytes": devices.memory_bytes},
  }


def headline(facts: dict[str, Any], plan: Plan) -> str:
  """Returns the first lines of a run: the model, the devices, memory, kernels and, with stages, their bubble."""
  model, device = facts["model"], facts["device"]
  axes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items() if size > 1) or "one device"
  if facts["pipeline_bubble"]:
    axes += f", bubble {facts['pipeline_bubble']:.0%}"
  kernels = ", ".join(f"{letter} {name}" for letter, name in facts["kernels"].items())
  return (
    f"[setup] {model['layers']}: {model['parameters_total']:,} parameters, {model['parameters_active']:,} active; "
    f"{device['count']} x {device['kind']} ({axes}); about {plan.need.total / 2**30:.1f} of "
    f"{facts['memory']['have_bytes'] / 2**30:.1f} GiB a device; jax {facts['versions']['jax']}\n"
    f"[setup] kernels: {kernels or 'no choice'}; compiled programs are kept in {jax.config.jax_compilation_cache_dir}"
  )


def data_facts(prepared: PreparedData) -> dict[str, Any]:
  """Returns the sources, the sizes of both splits, and what was left out."""
  infos = prepared.infos
  facts: dict[str, Any] = {"source": ", ".join(info.source for info in infos), "fingerprint": prepared.fingerprint}
  for split in SPLITS:
    facts |= {
      f"{split}_documents": sum(info.documents[split] for info in infos),
      f"{split}_tokens": sum(info.tokens[split] for info in infos),
      f"{split}_bytes": sum(info.text_bytes[split] for info in infos),
    }
  left_out = sum((Counter(info.left_out) for info in infos), Counter())
  return facts | ({"left_out": dict(left_out)} if left_out else {})


def gzip_bits_per_byte(prepared: PreparedData) -> float:
  """Returns what gzip -9 needs for a byte of the validation split."""
  return 8 * sum(info.gzip_bytes for info in prepared.infos) / prepared.validation.text_bytes
