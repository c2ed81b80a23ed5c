"""A Hugging Face directory as a run: config.json, a tokenizer, and a checkpoint of step 0."""

import dataclasses
from pathlib import Path

from ultrathink_jax.config import Config
from ultrathink_jax.data.tokenizer import load_tokenizer
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.interop import huggingface
from ultrathink_jax.lora.adapting import optimizer_of
from ultrathink_jax.optimizers.optimizers import make_optimizer
from ultrathink_jax.optimizers.schedules import make_schedule
from ultrathink_jax.train.checkpoint import Checkpoints
from ultrathink_jax.train.state import begin
from ultrathink_jax.types import Parameters

# Keys of the model section that say how an imported model is trained or run, not what it is.
RUN_KEYS = (
  "remat",
  "gather_ahead",
  "unroll",
  "attention_backend",
  "experts_backend",
  "ssd_backend",
  "capacity_factor",
  "router_noise",
  "router_noise_steps",
)
_CONFIG_FILE = '''"""The configuration of an imported model.

Command:  python -m ultrathink_jax.main --config={path} --workdir={workdir} [--config.section.key=value ...]
"""

import json
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(_with_tuples(json.loads(Path(__file__).with_name("config.json").read_text())))


def _with_tuples(value):
  if isinstance(value, dict):
    return {{key: _with_tuples(item) for key, item in value.items()}}
  return tuple(value) if isinstance(value, list) else value
'''


def import_directory(source: Path, workdir: Path, config: Config, tokenizer_directory: Path) -> Config:
  """Returns the configuration of the new run: `config` with the model and the tokenizer of `source`.

  Raises:
    ConfigError: the workdir holds a run, or the model is one that we do not compute.
    CheckpointError: a file of the model is missing or damaged.
    DataError: there is no tokenizer.
  """
  if (workdir / "config.json").exists() or (workdir / "checkpoints").exists():
    raise ConfigError(f"{workdir} holds a run already; choose another --workdir")
  tokenizer = load_tokenizer(source)
  model, params = huggingface.load(source)
  model = dataclasses.replace(model, **{key: getattr(config.model, key) for key in RUN_KEYS})
  own_tokenizer = workdir / "tokenizer"
  for directory in (own_tokenizer, tokenizer_directory):
    tokenizer.save(directory)
  data = dataclasses.replace(config.data, tokenizer=str(own_tokenizer))
  config = dataclasses.replace(config, model=model, data=data)
  write_first_checkpoint(workdir, config, params)
  return config


def write_first_checkpoint(workdir: Path, config: Config, params: Parameters) -> None:
  """Writes a checkpoint of step 0, which holds `params`, and the configuration of the run, to train on by."""
  optimizer = make_optimizer(optimizer_of(config), make_schedule(config.optimizer, config.train.steps))
  state = begin(config, params, optimizer)
  with Checkpoints(workdir / "checkpoints", config.checkpoint) as checkpoints:
    checkpoints.save(state, 0, {})
    checkpoints.wait()
  path = workdir / "config.py"
  path.write_text(_CONFIG_FILE.format(path=path, workdir=workdir))
  (workdir / "config.json").write_text(config.to_json())
