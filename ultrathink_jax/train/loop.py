"""The training loop: restore or begin, step, report, evaluate, save; go back, stop early or stop when told to."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax

from ultrathink_jax.config import Config
from ultrathink_jax.errors import ConfigError, NumericsError, Preempted
from ultrathink_jax.interruption import Stopped
from ultrathink_jax.logs import log
from ultrathink_jax.optimizers.averaging import averaged
from ultrathink_jax.parallel.placement import place, rows_here
from ultrathink_jax.testing.faults import Faults
from ultrathink_jax.train.advice import Advisor
from ultrathink_jax.train.beginning import LoadBase, make_beginning
from ultrathink_jax.train.checkpoint import Checkpoints, shapes_on
from ultrathink_jax.train.failure import find_failure
from ultrathink_jax.train.goodput import Goodput
from ultrathink_jax.train.metrics import MetricsWriter, open_writer
from ultrathink_jax.train.plan import Plan, compile_step
from ultrathink_jax.train.profiling import Profiler
from ultrathink_jax.train.reporting import Reporter
from ultrathink_jax.train.restoring import restore_or_begin
from ultrathink_jax.train.supervisor import Supervisor
from ultrathink_jax.types import Parameters, Recipe, Source


class Surroundings(NamedTuple):
  """What a session meets outside the train step.

  Attributes:
    workdir: where it leaves its files.
    make_source: takes which rows of every batch this process reads.
    identity: of the data; it is saved with every checkpoint and must be the same on resume.
    evaluate: parameters -> metrics, called after every `evaluate.every_steps` steps.
    supervisor: who may stop it.
    faults: what is made to fail.
    profiler: which steps are traced.
    goodput: keeps the account of the time.
    load_base: reads the base that an adapted run freezes.
    allow_fresh_start: whether to begin anew where every checkpoint is damaged.
  """

  workdir: Path
  make_source: Callable[[Sequence[int]], Source]
  identity: dict[str, Any]
  evaluate: Callable[[Parameters], dict[str, float]]
  supervisor: Supervisor
  faults: Faults
  profiler: Profiler
  goodput: Goodput
  load_base: LoadBase
  allow_fresh_start: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What is left after the last step; `best_step` is where `params` are from if training ended early."""

  params: Parameters
  start_step: int
  step: int
  best_step: int | None
  compile_seconds: float
  train_seconds: float


def train(config: Config, recipe: Recipe, plan: Plan, around: Surroundings) -> Outcome:
  """Trains to the last step from the newest intact checkpoint, or from the start where there is none.

  Raises:
    CheckpointError: no checkpoint is intact, the data have changed, or one cannot be written.
    NumericsError: losses or gradients are not finite and going back did not help.
    Preempted: a signal ended it; the state is saved.
  """
  directory = around.workdir / "checkpoints"
  best_is = config.evaluate.best_is
  with jax.set_mesh(plan.mesh), Checkpoints(directory, config.checkpoint, log, best_is) as checkpoints:
    session = _Session(config, recipe, plan, around, checkpoints)
    with open_writer(around.workdir, session.start, config.train.steps, config) as writer:
      return session.run(writer)


class _Session:
  """`done` counts the steps behind the state."""

  def __init__(self, config: Config, recipe: Recipe, plan: Plan, around: Surroundings, checkpoints: Checkpoints):
    self._config, self._recipe, self._plan, self._around = config, recipe, plan, around
    self._checkpoints = checkpoints
    self._first_state, self._frozen = make_beginning(config, recipe, plan, around.load_base)
    self._restore_or_begin()
    self.start = self._saved = self._done
    self._failed_at = self._rollbacks = 0
    self._pending: tuple[int, dict[str, Any]] | None = None

  def _restore_or_begin(self, before: int | None = None) -> None:
    around = self._around
    self._state, self._done, self._progress = restore_or_begin(
      self._plan, self._first_state, self._checkpoints, around.identity, around.allow_fresh_start, before
    )
    self._is_skipping = False

  def run(self, writer: MetricsWriter) -> Outcome:
    """Trains to the end."""
    config = self._config
    if self.start:
      log(f"[resume] from step {self.start} of {config.train.steps}")
    compile_seconds = train_seconds = 0.0
    if not self._is_over():
      compile_seconds = self._compile()
      self._reporter = Reporter(config, self._recipe, self._plan.schedule, writer, self._around.goodput, self.start)
      self._advisor = Advisor(config.advice, self._around.workdir)
      self._writer = writer
      self._around.goodput.begin(self.start)
      begun = time.monotonic()
      with self._around.supervisor.phase("train", "finish"):
        self._go()
      train_seconds = time.monotonic() - begun
      self._around.profiler.close()
    best_step = self._progress.best_step if self._progress.has_ended else None
    params = self._weights()
    if best_step is not None:
      like = shapes_on(self._plan.shapes.params, self._plan.shardings.params)
      params = self._recipe.weights(self._checkpoints.restore_params(best_step, like), self._frozen)
    return Outcome(params, self.start, self._done, best_step, compile_seconds, train_seconds)

  def _is_over(self) -> bool:
    return self._done >= self._config.train.steps or self._progress.has_ended

  def _compile(self) -> float:
    rows = self._config.train.batch_size
    self._source = self._around.make_source(rows_here(self._plan.mesh, rows))
    batch = self._read(self._done)
    begun = time.monotonic()
    with self._around.goodput.spent("compile"):
      self._step = compile_step(self._config, self._recipe, self._plan, self._state, self._frozen, batch)
    seconds = time.monotonic() - begun
    log(f"[compile] train step in {seconds:.1f}s")
    return seconds

  def _read(self, step: int) -> Any:
    batch = self._source(step + self._progress.data_offset, self._state)
    return place(self._plan.mesh, batch, self._config.train.batch_size)

  def _go(self) -> None:
    supervisor = self._around.supervisor
    try:
      while True:
        if (self._is_evaluation_due() or self._is_save_due()) and not self._report(None):
          self._go_back()
          continue
        value = self._evaluate() if self._is_evaluation_due() else None
        if self._is_save_due() or self._is_best(value):
          self._save(value)
        if self._is_over():
          break
        if not supervisor.may_begin(self._done):
          self._leave()
        if not self._advance():
          self._go_back()
      with supervisor.phase("save", "finish"):
        self._checkpoints.wait()
    except Stopped:
      self._leave()

  def _is_evaluation_due(self) -> bool:
    every = self._config.evaluate.every_steps
    is_time = bool(every) and self._done and (self._done % every == 0 or self._is_over())
    return is_time and self._progress.evaluated != self._done

  def _is_save_due(self) -> bool:
    """Returns whether to save; among steps that do not count only at the end, for there may be no way on from there."""
    if self._done <= self._saved:
      return False
    return self._is_over() or (self._checkpoints.due(self._done) and not self._is_skipping)

  def _advance(self) -> bool:
    """Makes a step; returns False where too many in a row did not count."""
    around, step = self._around, self._done
    around.faults.before_step(step)
    asked = time.monotonic()
    with around.supervisor.phase("data", "raise"):
      batch = self._read(step)
    self._reporter.waited(time.monotonic() - asked)
    around.goodput.add("data_wait", time.monotonic() - asked)
    with around.supervisor.phase("step", "finish"), around.profiler.step(step):
      self._state, sums = self._step(self._state, self._frozen, batch)
      self._done += 1
      return self._report(sums)

  def _report(self, sums: dict[str, Any] | None) -> bool:
    """Reports the step before, which is done by now, and keeps the metrics of this one for the next call.

    Returns False where too many steps in a row did not count.
    """
    pending, self._pending = self._pending, None if sums is None else (self._done, sums)
    if pending is None:
      return True
    step, sums = pending
    if self._reporter.is_logged(step):
      self._around.goodput.mark(step)
      for line in self._advisor.after(step, self._reporter.write(step, sums)):
        log(line)
    self._is_skipping = bool(sums["skipped_in_a_row"])
    if not self._is_skipping:
      return True
    loss = float(sums["loss/total"]) / max(float(sums["weight"]), 1e-8)
    log(f"[guard] step {step} does not count: loss {loss:.4g}, gradient norm {float(sums['grad_norm']):.4g}")
    self._failure = find_failure(step, sums, self._config.optimizer.guard.max_skipped)
    return self._failure is None

  def _evaluate(self) -> float | None:
    """Returns the value that the best checkpoint is chosen by, where one is."""
    config = self._config.evaluate
    with self._around.goodput.spent("evaluation"), self._around.supervisor.phase("evaluate", "raise"):
      values = self._around.evaluate(self._weights())
    self._writer.evaluation(self._done, values)
    self._reporter.restart_clock(self._done)
    self._progress = self._progress._replace(evaluated=self._done)
    if not (config.patience or self._config.checkpoint.keep_best):
      return None
    values = self._reporter.latest | values
    if config.best_metric not in values:
      raise ConfigError(f"evaluate.best_metric={config.best_metric!r} is not reported; choose of {', '.join(values)}")
    value = float(values[config.best_metric])
    self._progress = self._progress.after_evaluation(config, self._done, value)
    if self._progress.has_ended:
      log(
        f"[early] {config.best_metric} was best at step {self._progress.best_step}, {config.patience} evaluations ago: "
        f"training ends, and that step's parameters are the result"
      )
    return value

  def _is_best(self, value: float | None) -> bool:
    is_best = value is not None and self._progress.best_step == self._done
    return is_best and self._config.checkpoint.keep_best > 0 and self._done > self._saved

  def _weights(self) -> Parameters:
    """Returns what the model to evaluate reads: the averaged parameters, where there are any."""
    average = averaged(self._state.opt_state, self._state.params) if self._config.evaluate.averaged else None
    return self._recipe.weights(self._state.params if average is None else average, self._frozen)

  def _save(self, value: float | None = None) -> None:
    around = self._around
    if self._config.evaluate.patience and self._progress.best_step != self._done:
      value = None  # a gain below min_delta must not take the place of the best
    position = {**around.identity, "progress": self._progress._asdict()}
    average = averaged(self._state.opt_state, self._state.params)
    with (
      around.goodput.spent("checkpoint"),
      around.supervisor.phase("save", "finish"),
      around.faults.saving(self._done),
    ):
      self._checkpoints.save(self._state, self._done, position, value, average)
    around.goodput.mark(self._done, is_saved=True)
    self._saved = self._done
    self._reporter.restart_clock(self._done)

  def _leave(self) -> NoReturn:
    """Saves what there is and ends the session."""
    self._report(None)
    with self._around.supervisor.phase("save", "finish"):
      if self._done > self._saved:
        self._save()
      self._checkpoints.wait()
    requested = self._around.supervisor.requested()
    if self._done == 0:
      raise Preempted(f"{requested} before the first step: the same command begins anew")
    raise Preempted(f"{requested} after step {self._done}, which is saved: the same command goes on from it")

  def _go_back(self) -> None:
    """Takes the last checkpoint up again and leaves out the batches since, or ends the run where that did not help."""
    guard, failure = self._config.optimizer.guard, self._failure
    if self._rollbacks and failure.step > self._failed_at:
      self._rollbacks = 0
    if self._rollbacks >= guard.max_rollbacks:
      samples = self._source.samples(failure.first_step - 1 + self._progress.data_offset)
      raise NumericsError(failure.explain(samples, self._rollbacks))
    self._rollbacks += 1
    self._failed_at = self._done
    next_batch = self._done + self._progress.data_offset
    self._pending = None
    self._restore_or_begin(before=failure.first_step)
    self._progress = self._progress._replace(data_offset=next_batch - self._done)
    self._saved = max(0, self._done - 1)  # the checkpoint is made again, with where the data go on
    self._writer.rewind(self._done)
    self._advisor.rewind(self._done)
    self._around.goodput.begin(self._done)
    self._reporter.restart_clock(self._done)
    log(
      f"[rollback] {failure.in_a_row} steps in a row up to {failure.step} did not count: back to step {self._done}, "
      f"and on with the data that step {next_batch + 1} would have read"
    )
