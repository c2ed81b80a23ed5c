"""The base of an adapted run: the parameters of a whole model that checkpoint.init_from names."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import xxhash

from ultrathink_jax.config import Config, ModelConfig
from ultrathink_jax.config.older import from_saved
from ultrathink_jax.errors import CheckpointError, ConfigError
from ultrathink_jax.interop import huggingface
from ultrathink_jax.interop.pretrained import load_pretrained, read_model
from ultrathink_jax.interop.workdir import RUN_KEYS
from ultrathink_jax.logs import log
from ultrathink_jax.models.language_model import parameter_shapes
from ultrathink_jax.train.checkpoint import Checkpoints, shapes_on
from ultrathink_jax.train.digests import MANIFEST
from ultrathink_jax.train.progress import result_step
from ultrathink_jax.types import Parameters

# Keys of the model section that may differ between a base and what is made of it.
_FREE_KEYS = (*RUN_KEYS, "dtype", "pipe_micro_batches", "expert_buffer_factor", "expert_chunks")


class Base:
  """What `path` names: a workdir and the step of its result, one checkpoint, or a saved directory.

  Raises CheckpointError where there is no such model, and ConfigError where it is not one of `model`.
  """

  def __init__(self, path: str | Path, model: ModelConfig):
    self.path, self._model = Path(path), model
    self._workdir, self._step = self._find()
    _require_same(self.path, model, saved_model(self.path))

  def _find(self) -> tuple[Path | None, int | None]:
    path, workdir = self.path, workdir_of(self.path)
    if workdir not in (None, path):
      return workdir, int(path.name)
    if workdir is not None:
      with Checkpoints(path / "checkpoints", log=log) as checkpoints:
        step = result_step(checkpoints)
      if step is None:
        raise CheckpointError(f"checkpoint.init_from={path} holds no finished checkpoint; train there first")
      return path, step
    if (path / "config.json").is_file():
      return None, None
    raise CheckpointError(
      f"checkpoint.init_from={path} is neither a workdir with checkpoints nor a saved model; train, import or save one "
      "there, or name another"
    )

  @property
  def fingerprint(self) -> str:
    """The same as long as the weights are: of a checkpoint's digests, or of the files of a directory."""
    if self._workdir is None:
      files = [*self.path.glob("*.safetensors"), self.path / "config.json"]
    else:
      checkpoint = self._workdir / "checkpoints" / str(self._step)
      manifest = checkpoint / MANIFEST  # older checkpoints have none
      files = [manifest] if manifest.exists() else [file for file in checkpoint.rglob("*") if file.is_file()]
    digest = xxhash.xxh3_128()
    for file in sorted(files):
      with file.open("rb") as content:
        while part := content.read(2**24):
          digest.update(part)
    return digest.hexdigest()

  def load(self, shardings: Any = None) -> Parameters:
    """Returns the float32 parameters, laid out by `shardings`, by default on this process's first device."""
    if shardings is None:
      device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      shardings = jax.tree.map(lambda _: device, parameter_shapes(self._model))
    if self._workdir is not None:
      with Checkpoints(self._workdir / "checkpoints", log=log) as checkpoints:
        return checkpoints.restore_params(self._step, shapes_on(parameter_shapes(self._model), shardings))
    _, params = huggingface.load(self.path) if self._is_foreign else load_pretrained(self.path)[:2]
    return jax.tree.map(jax.device_put, params, shardings)

  @property
  def _is_foreign(self) -> bool:
    return huggingface.is_huggingface(self.path)


def tokenizer_directory(path: Path) -> Path:
  """Returns where a workdir, one of its checkpoints, or a saved directory has its tokenizer."""
  workdir = workdir_of(path)
  return path if workdir is None else workdir / "data" / "tokenizer"


def workdir_of(path: Path) -> Path | None:
  """Returns the workdir that a path is, or is a checkpoint of; None for a saved directory."""
  if path.parent.name == "checkpoints" and path.name.isdigit():
    return path.parent.parent
  return path if (path / "checkpoints").is_dir() else None


def saved_config(workdir: Path) -> Config:
  """Returns the configuration of a run. Raises CheckpointError where it has none that can be read."""
  try:
    return from_saved(json.loads((workdir / "config.json").read_text()))
  except (OSError, json.JSONDecodeError) as error:
    raise CheckpointError(f"{workdir / 'config.json'} cannot be read: {error}") from error


def saved_model(path: Path) -> ModelConfig:
  """Returns the model of a workdir or a saved directory that can be a base. Raises CheckpointError and ConfigError."""
  workdir = workdir_of(path)
  if workdir is None:
    return huggingface.read_config(path)[1] if huggingface.is_huggingface(path) else read_model(path)
  config = saved_config(workdir)
  if config.is_adapted:
    raise ConfigError(
      f"{workdir} is adapted itself, and holds no whole model: write the one it makes with --mode=export --merge "
      f"--workdir={workdir} --output=DIR, and take that"
    )
  return config.model


def _require_same(path: Path, model: ModelConfig, saved: ModelConfig) -> None:
  ours, theirs = dataclasses.asdict(model), dataclasses.asdict(saved)
  others = [key for key in ours if key not in _FREE_KEYS and ours[key] != theirs[key]]
  if others:
    differences = ", ".join(f"model.{key} is {theirs[key]!r} there and {ours[key]!r} here" for key in others[:3])
    raise ConfigError(
      f"{path} is another model than this configuration's: {differences}; take its own, as with "
      f"--config=configs/lora.py:{path}"
    )
