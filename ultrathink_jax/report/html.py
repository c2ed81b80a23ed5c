"""The report of a run as one HTML page that needs no network and no other file."""

from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from ultrathink_jax.report import experts, plots
from ultrathink_jax.report.page import Section, Tile, short
from ultrathink_jax.report.page import write as write_page
from ultrathink_jax.report.run import Run, other_keys, read, series
from ultrathink_jax.train.console import format_duration

PLOTTED = {
  "step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "data_wait_seconds",
  "skipped_steps", "goodput", "moe/entropy", "moe/max_expert", "moe/dropped",
}  # fmt: skip
MAX_OTHER_PLOTS = 24


def write(workdir: Path) -> Path:
  """Returns the path of `workdir`/report.html, written from the files that the run left so far."""
  run = read(workdir)
  values = {
    "name": run.name,
    "pattern": run.fact("model", "layers") or run.setting("model", "layers") or "",
    "progress": _progress(run),
    "compression": _compression(run),
    "tiles": _tiles(run),
    "sections": _sections(run),
    "samples": run.fact("samples") or [],
    "command": (run.fact("command") or "").split(),
    "resumed_from": [f"{step:,}" for step in run.fact("resumed_from_steps") or ()],
    "facts": _facts(run),
    "config": _settings(run),
  }
  return write_page(workdir / "report.html", "page.html", values)


def _progress(run: Run) -> str:
  """Returns how far the run came, in words."""
  if not run.metrics:
    return "no step logged yet"
  step, planned = run.metrics[-1]["step"], run.fact("steps") or run.setting("train", "steps")
  if planned is None:
    return f"{step:,} steps"
  return f"{step:,} steps, complete" if step >= planned else f"{step:,} of {planned:,} steps"


def _result(run: Run) -> dict[str, Any]:
  """Returns the last validation result: run.json's, or else the last evaluation's."""
  result = dict(run.fact("result") or {})
  if not result and run.evaluations:
    last = run.evaluations[-1]
    result = {key.removeprefix("evaluate/"): value for key, value in last.items()}
  return result


def _compression(run: Run) -> dict[str, Any] | None:
  """Returns the bits per byte of the model and of gzip -9 with the lengths of their bars in percent."""
  result = _result(run)
  bits, gzip_bits = result.get("bits_per_byte"), result.get("gzip_bits_per_byte")
  if bits is None:
    return None
  if gzip_bits is None:
    return {"bits": f"{bits:.3f}", "gzip_bits": None}
  longest = max(bits, gzip_bits)
  percent = 100 * (bits / gzip_bits - 1)
  return {
    "bits": f"{bits:.3f}",
    "gzip_bits": f"{gzip_bits:.3f}",
    "width": f"{100 * bits / longest:.1f}",
    "gzip_width": f"{100 * gzip_bits / longest:.1f}",
    "verdict": f"{abs(percent):.0f}% {'fewer' if percent < 0 else 'more'} bits than gzip -9",
  }


def _tiles(run: Run) -> list[Tile]:
  result, tiles = _result(run), []
  if result.get("loss") is not None:
    notes = [] if result.get("step") is None else [f"at step {result['step']:,}"]
    if result.get("perplexity") is not None:
      notes.append(f"perplexity {_significant(result['perplexity'])}")
    tiles.append(Tile("validation loss", f"{result['loss']:.4f}", ", ".join(notes)))
  elif run.metrics and run.metrics[-1].get("loss") is not None:
    tiles.append(Tile("training loss", f"{run.metrics[-1]['loss']:.4f}", "not evaluated yet"))
  if run.metrics and run.metrics[-1].get("tokens") is not None:
    tokens = run.metrics[-1]["tokens"]
    tiles.append(Tile("tokens seen", short(tokens), f"{tokens:,}" if tokens >= 10_000 else ""))
  seconds = run.fact("train_seconds")
  if seconds is not None:
    tiles.append(Tile("wall time", format_duration(seconds), "training"))
  elif step_seconds := _step_seconds(run):
    tiles.append(Tile("wall time", format_duration(step_seconds), "in logged steps"))
  share = run.fact("goodput", "share")
  if share is not None:
    tiles.append(Tile("goodput", f"{share:.0%}", "of all time, in steps that count"))
  _, throughput = series(run.metrics, "tokens_per_second")
  if np.isfinite(throughput).any():
    tiles.append(Tile("throughput", f"{np.nanmedian(throughput):,.0f}", "tokens/s, median"))
  return tiles


def _step_seconds(run: Run) -> float:
  """Returns the time all steps took, from the mean step time of each logged stretch."""
  steps, seconds = series(run.metrics, "step_seconds")
  return float(np.nansum(np.diff(steps, prepend=0) * seconds))


def _sections(run: Run) -> list[Section]:
  curves = [
    plots.scalar(run, "learning_rate", "Learning rate", "learning rate", "zero"),
    plots.scalar(run, "grad_norm", "Gradient norm", "global norm before clipping", "log"),
    plots.together(run, "grad_norm/", "Gradient norm by part", "norm before clipping"),
    plots.scalar(run, "tokens_per_second", "Throughput", "tokens per second", "zero"),
    plots.scalar(run, "step_seconds", "Step time", "seconds", "log"),
  ]
  left = [key for key in other_keys(run, PLOTTED) if not key.startswith("grad_norm/") and not key.endswith("_weighted")]
  others = [plots.scalar(run, key, key, "") for key in left[:MAX_OTHER_PLOTS]]
  sections = [
    ("", True, [plots.loss(run)]),
    ("", False, curves),
    ("Experts", True, [experts.expert_load(run), experts.routing(run)]),
    ("Other metrics", False, others),
  ]
  made = [Section(title, is_wide, [plot for plot in found if plot]) for title, is_wide, found in sections]
  return [section for section in made if section.plots]


def _facts(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
  """Returns the groups of facts that run.json holds; the absent ones are left out."""

  def count(*keys: str) -> str | None:
    value = run.fact(*keys)
    return None if value is None else f"{value:,}"

  def size(*keys: str) -> str | None:
    value = run.fact(*keys)
    return None if value is None else f"{value:,} ({_binary(value)})" if value >= 1024 else f"{value}"

  total, active = run.fact("model", "parameters_total"), run.fact("model", "parameters_active")
  flops, compile_seconds = run.fact("model", "flops_per_token"), run.fact("compile_seconds")
  mesh = " \N{MULTIPLICATION SIGN} ".join(
    f"{axis} {size}" for axis, size in (run.fact("mesh") or {}).items() if size != 1
  )
  device = run.fact("device") or {}
  groups = {
    "Model": [
      ("layers", run.fact("model", "layers")),
      ("parameters", None if total is None else f"{total:,} ({short(total)})"),
      ("active per token", None if active is None else f"{active:,} ({short(active)})"),
      ("FLOPs per token", None if flops is None else short(flops)),
    ],
    "Machine": [
      ("device", f"{device.get('count', 1)} \N{MULTIPLICATION SIGN} {device['kind']}" if device.get("kind") else None),
      ("platform", device.get("platform")),
      ("mesh", mesh or ("one device" if run.fact("mesh") else None)),
      ("memory, peak", _binary(run.fact("memory", "peak_bytes"))),
      ("memory, planned", _binary(run.fact("memory", "need_bytes"))),
      ("memory, available", _binary(run.fact("memory", "have_bytes"))),
      ("compilation", None if compile_seconds is None else f"{compile_seconds:.1f} s"),
    ],
    "Training data": [
      ("source", run.fact("data", "source")),
      ("documents", count("data", "train_documents")),
      ("tokens", count("data", "train_tokens")),
      ("bytes", size("data", "train_bytes")),
      ("fingerprint", run.fact("data", "fingerprint")),
    ],
    "Validation data": [
      ("documents", count("data", "validation_documents")),
      ("tokens", count("data", "validation_tokens")),
      ("bytes", size("data", "validation_bytes")),
    ],
    "Software": list((run.fact("versions") or {}).items()),
  }
  present = [(title, [(label, value) for label, value in rows if value]) for title, rows in groups.items()]
  return [(title, rows) for title, rows in present if rows]


def _settings(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
  """Returns the configuration as (section, [(key, value)]); top-level keys come first, under no section."""
  top = [(key, _spell(value)) for key, value in run.config.items() if not isinstance(value, dict)]
  sections = [
    (section, [(key, _spell(value)) for key, value in keys.items()])
    for section, keys in run.config.items()
    if isinstance(keys, dict)
  ]
  return [("", top), *sections] if top else sections


def _spell(value: Any) -> str:
  """Returns a configuration value as it is written, so that it can be copied."""
  return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _significant(number: Real) -> str:
  return f"{number:,.0f}" if 1000 <= number < 1e7 else f"{number:.4g}"


def _binary(num_bytes: Real | None) -> str | None:
  if num_bytes is None:
    return None
  for unit in ("KiB", "MiB"):
    num_bytes /= 1024
    if num_bytes < 1024:
      return f"{num_bytes:,.1f} {unit}"
  return f"{num_bytes / 1024:,.1f} GiB"
