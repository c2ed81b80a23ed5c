"""The training loop: plan, restore or begin, step, report, evaluate, save."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ultrathink_jax.config import Config
from ultrathink_jax.errors import CheckpointError, NumericsError
from ultrathink_jax.optimizers.optimizers import make_optimizer
from ultrathink_jax.optimizers.schedules import make_schedule
from ultrathink_jax.parallel.devices import Devices, compiler_options
from ultrathink_jax.parallel.mesh import make_mesh
from ultrathink_jax.parallel.placement import place, replicated, rows_here
from ultrathink_jax.train.checkpoint import Checkpoints, shapes_on
from ultrathink_jax.train.metrics import MetricsWriter, open_writer
from ultrathink_jax.train.preflight import MemoryNeed, require_fit
from ultrathink_jax.train.state import make_init, state_shardings, to_device
from ultrathink_jax.train.step import make_train_step
from ultrathink_jax.types import Batch, Parameters, Recipe, TrainState


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run before anything is allocated: its mesh, its rules of motion, and the shapes and layout of its state."""

  mesh: Mesh
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  shapes: TrainState
  shardings: TrainState
  need: MemoryNeed


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What is left after the last step."""

  params: Parameters
  start_step: int
  compile_seconds: float
  train_seconds: float


def make_plan(
  config: Config, recipe: Recipe, devices: Devices, mesh_devices: Sequence[jax.Device] | None = None
) -> Plan:
  """Returns the plan of a run that is consistent and fits the devices, by default all. Raises ConfigError otherwise."""
  mesh = make_mesh(config, mesh_devices)
  schedule = make_schedule(config.optimizer, config.train.steps)
  optimizer = make_optimizer(config.optimizer, schedule)
  shapes, _ = jax.eval_shape(make_init(recipe, optimizer, config.train.seed))
  shardings = state_shardings(config, mesh, recipe, optimizer, shapes)
  return Plan(mesh, schedule, optimizer, shapes, shardings, require_fit(config, recipe, shapes, shardings, devices))


def train(
  config: Config,
  recipe: Recipe,
  plan: Plan,
  make_source: Callable[[Sequence[int]], Callable[[int, TrainState], Batch]],
  position: dict[str, Any],
  workdir: Path,
  evaluate: Callable[[Parameters], dict[str, float]],
) -> Outcome:
  """Trains to the last step from the newest checkpoint, or from the start where there is none.

  `make_source` takes which rows of every batch this process reads. `position` identifies the data; it is saved with
  every checkpoint and must be the same on resume. `evaluate` is called after every `evaluate.every_steps` steps.

  Raises:
    CheckpointError: the newest checkpoint cannot be read or was made on other data.
    NumericsError: a loss or gradient is not finite; the state is then not saved.
  """
  steps = config.train.steps
  with jax.set_mesh(plan.mesh), Checkpoints(workdir / "checkpoints", config.checkpoint.keep_last) as checkpoints:
    state, frozen, start = _restore_or_begin(config, recipe, plan, checkpoints, position)
    with open_writer(workdir, start, steps) as writer:
      if start:
        writer.log(f"[resume] from step {start} of {steps}")
      if start >= steps:
        return Outcome(state.params, start, 0.0, 0.0)
      num_rows = config.train.batch_size
      source = make_source(rows_here(plan.mesh, num_rows))
      put = lambda batch: place(plan.mesh, batch, num_rows)
      begun = time.monotonic()
      step_function = compile_step(config, recipe, plan, state, frozen, put(source(start, state)))
      compile_seconds = time.monotonic() - begun
      writer.log(f"[compile] train step in {compile_seconds:.1f}s")
      begun = time.monotonic()
      report = _Reporter(config, recipe, plan, writer, start)
      for step in range(start, steps):
        asked = time.monotonic()
        batch = source(step, state)
        report.waited(time.monotonic() - asked)
        state, sums = step_function(state, frozen, put(batch))
        done = step + 1
        report.after(done, sums)
        if config.evaluate.every_steps and (done % config.evaluate.every_steps == 0 or done == steps):
          report.flush()
          writer.evaluation(done, evaluate(state.params))
          report.restart_clock(done)
        if done % config.checkpoint.every_steps == 0 or done == steps:
          report.flush()
          _require_finite(done, jax.device_get(sums))
          checkpoints.save(state, done, position)
          report.restart_clock(done)
      checkpoints.wait()
      return Outcome(state.params, start, compile_seconds, time.monotonic() - begun)


def _restore_or_begin(
  config: Config, recipe: Recipe, plan: Plan, checkpoints: Checkpoints, position: dict[str, Any]
) -> tuple[TrainState, Any, int]:
  init = make_init(recipe, plan.optimizer, config.train.seed)
  newest = checkpoints.latest_step()
  if newest is None:
    state, frozen = jax.jit(init, out_shardings=(plan.shardings, None))()
    return state, frozen, 0
  state, saved_position = checkpoints.restore(newest, shapes_on(plan.shapes, plan.shardings))
  # A checkpoint that no step led to, as one made by mode import, has seen no data.
  changed = [key for key in position if saved_position.get(key, position[key]) != position[key]]
  if changed:
    key = changed[0]
    raise CheckpointError(
      f"checkpoint {newest} was trained on other data: {key} was {saved_position.get(key)!r} and is {position[key]!r}; "
      f"restore the data or choose another --workdir"
    )
  frozen = jax.jit(lambda: init()[1])()
  return state, frozen, newest


def step_function(config: Config, recipe: Recipe, plan: Plan) -> Callable:
  """Returns the train step of the run, not compiled yet."""
  train, on_device = config.train, []
  if config.optimizer.offload:
    on_device = [to_device(plan.shardings.opt_state)]
  return make_train_step(recipe, plan.optimizer, train.accumulation_steps, train.seed, config.mesh.zero, *on_device)


def compile_step(config: Config, recipe: Recipe, plan: Plan, state: TrainState, frozen: Any, batch: Batch) -> Callable:
  """Returns the compiled train step for arguments, or shapes, like these; the state is donated."""
  step = step_function(config, recipe, plan)
  jitted = jax.jit(step, donate_argnums=0, out_shardings=(plan.shardings, replicated(plan.mesh)))
  return jitted.lower(state, frozen, batch).compile(compiler_options=compiler_options(config.model.dtype))


def _require_finite(step: int, sums: dict[str, Any]) -> None:
  for name in ("loss/total", "grad_norm"):
    if not np.isfinite(sums[name]):
      raise NumericsError(
        f"{name} is {sums[name]} at step {step}; nothing was saved after the last checkpoint: resume with a lower "
        f"optimizer.learning_rate or optimizer.clip_norm, or another train.seed"
      )


class _Reporter:
  """Writes the metrics of logged steps one step late, so that reading them never makes the device wait."""

  def __init__(self, config: Config, recipe: Recipe, plan: Plan, writer: MetricsWriter, start: int):
    self._train, self._summarize, self._schedule, self._writer = config.train, recipe.summarize, plan.schedule, writer
    self._pending: tuple[int, dict[str, Any]] | None = None
    self.restart_clock(start)

  def restart_clock(self, step: int) -> None:
    """Starts to time anew after `step`: what came between was no training."""
    self._timed_from = (step, time.monotonic())
    self._waited_seconds = 0.0

  def waited(self, seconds: float) -> None:
    """Counts seconds in which a step had to wait for its batch."""
    self._waited_seconds += seconds

  def after(self, step: int, sums: dict[str, Any]) -> None:
    self.flush()
    if step == 1 or step % self._train.log_every_steps == 0 or step == self._train.steps:
      self._pending = (step, sums)

  def flush(self) -> None:
    if self._pending is None:
      return
    step, sums = self._pending
    self._pending = None
    sums = jax.device_get(sums)
    (timed_step, timed_at), waited = self._timed_from, self._waited_seconds
    self.restart_clock(step)
    num_steps = max(1, step - timed_step)
    seconds = (self._timed_from[1] - timed_at) / num_steps
    _require_finite(step, sums)
    tokens = self._train.batch_size * self._train.sequence_length
    values = self._summarize(sums)
    self._writer.write(
      step,
      {
        "loss": values.pop("loss"),
        "learning_rate": float(self._schedule(step - 1)),
        "grad_norm": float(sums["grad_norm"]),
        "tokens": step * tokens,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "step_seconds": seconds,
        "data_wait_seconds": waited / num_steps,
        **values,
      },
    )
