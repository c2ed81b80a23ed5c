"""The directory of a run: whose it is, and the JSON files in it."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultrathink_jax.config import Config
from ultrathink_jax.config.older import from_saved
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.redaction import redact

# Sections and keys that change how a run is computed and watched, not what is trained.
_FREE_SECTIONS = ("mesh", "evaluate", "checkpoint", "log", "advice", "generate")
_FREE_KEYS = (
  *("data.workers", "train.log_every_steps", "train.hang_seconds", "optimizer.offload"),
  *("model.remat", "model.gather_ahead"),
  *("model.unroll", "model.pipe_micro_batches", "model.expert_chunks"),
  *("model.attention_backend", "model.ssd_backend", "model.experts_backend"),
)


def claim(workdir: Path, config: Config, log: Callable[[str], None] = print, force: bool = False) -> None:
  """Writes config.json, without secrets, or refuses a workdir that holds a run of another model, data or schedule.

  What differs is logged; with `force` the run goes on by the new values. A workdir from which nothing has come yet, as
  where the first attempt was refused, is whoever's asks next.
  """
  path = workdir / "config.json"
  values = redact(json.loads(config.to_json()))
  if path.exists():
    before, now = _flatten(redact(json.loads(from_saved(read_json(path)).to_json()))), _flatten(values)
    changed = [key for key in now if now[key] != before[key] and not _is_free(key)]
    steps = [step.name for step in (workdir / "checkpoints").glob("[0-9]*")]
    if steps == ["0"]:  # imported, and not trained yet
      changed = [key for key in changed if key.startswith("model.") or key == "data.tokenizer"]
    for key in changed:
      log(f"[config] {key}: {before[key]!r} -> {now[key]!r}")
    is_begun = steps or (workdir / "trials").exists()
    if changed and is_begun and not force:
      differences = ", ".join(f"{key} was {before[key]!r} and is {now[key]!r}" for key in changed[:4])
      more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
      raise ConfigError(
        f"{workdir} holds another run: {differences}{more}; choose another --workdir, the old values, or --force to go "
        f"on by the new ones"
      )
  workdir.mkdir(parents=True, exist_ok=True)
  write_json(path, values)


def _is_free(key: str) -> bool:
  return key.split(".")[0] in _FREE_SECTIONS or key in _FREE_KEYS


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(values, dict):
    return {prefix[:-1]: values}
  flat: dict[str, Any] = {}
  for key, value in values.items():
    flat |= _flatten(value, f"{prefix}{key}.")
  return flat


def read_json(path: Path) -> dict[str, Any]:
  """Returns the contents of `path`, or {} where there is no readable file."""
  with contextlib.suppress(OSError, json.JSONDecodeError):
    return json.loads(path.read_text())
  return {}


def write_json(path: Path, values: dict[str, Any]) -> None:
  """Writes `path` as a whole or not at all."""
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(values, indent=2) + "\n")
  temporary.replace(path)
