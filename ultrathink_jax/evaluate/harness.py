"""Tasks of lm-eval-harness, which is imported when one is run."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultrathink_jax.errors import ConfigError

_RESAMPLES = 1000  # for the standard errors of metrics that are no means


def run_tasks(
  model: Any,
  tasks: Sequence[str],
  window_tokens: int,
  batch_size: int = 8,
  folder: Path | None = None,
  limit: int | None = None,
) -> dict[str, Any]:
  """Returns {task: {metric: value}} by a model with config, params and tokenizer, such as `ultrathink_jax.load` gives.

  `folder` has the YAML files of tasks of one's own; `limit` is how many documents of each task are read.

  Raises:
    ConfigError: lm_eval is not installed, or has no such task.
  """
  if importlib.util.find_spec("lm_eval") is None:
    raise ConfigError(
      "tasks need the package lm_eval, which is not installed; run pip install 'ultrathink-jax[lm-eval]'"
    )
  from lm_eval import simple_evaluate
  from lm_eval.tasks import TaskManager

  from ultrathink_jax.evaluate.lm_eval_model import HarnessModel

  os.environ.setdefault("DISABLE_MULTIPROC", "1")  # processes forked beside JAX's threads may never end
  manager = TaskManager(include_path=None if folder is None else str(folder))
  if unknown := set(tasks) - set(manager.all_tasks):
    raise ConfigError(
      f"tasks {', '.join(sorted(unknown))}: not known to lm_eval; see lm_eval ls tasks, or give their folder"
    )
  lm = HarnessModel(model, window_tokens, batch_size)
  found = simple_evaluate(
    lm, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=_RESAMPLES
  )
  return {name: _numbers(values) for name, values in found["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
  """Returns the metrics of a task by their names, without the names of filters where there is only one."""
  return {
    key.removesuffix(",none"): float(value)
    for key, value in values.items()
    if isinstance(value, (int, float)) and not isinstance(value, bool)
  }
