"""What a session of a run says about its steps, read from the device one step late so that it never waits."""

import time
from typing import Any

import jax
import optax

from ultrathink_jax.config import Config
from ultrathink_jax.lora.coverage import flops_per_token
from ultrathink_jax.models.counts import count_model
from ultrathink_jax.parallel.chips import peak_flops
from ultrathink_jax.parallel.devices import memory_in_use_bytes
from ultrathink_jax.train.goodput import Goodput
from ultrathink_jax.train.metrics import MetricsWriter
from ultrathink_jax.types import Recipe


class Reporter:
  """Turns the metrics of steps into what the writer records.

  `latest` holds the values that were written last.
  """

  def __init__(
    self,
    config: Config,
    recipe: Recipe,
    schedule: optax.Schedule,
    writer: MetricsWriter,
    goodput: Goodput,
    start: int,
  ):
    self._goodput = goodput
    self._train, self._summarize, self._schedule, self._writer = config.train, recipe.summarize, schedule, writer
    self._tokens = config.train.batch_size * config.train.sequence_length
    flops = flops_per_token(config, count_model(config.model))
    peak = peak_flops()
    self._peak_tokens_per_second = peak / flops if peak else None
    self.latest: dict[str, Any] = {}
    self.restart_clock(start)

  def restart_clock(self, step: int) -> None:
    """Starts to time anew after `step`: what came between was no training."""
    self._timed_from = (step, time.monotonic())
    self._waited_seconds = 0.0

  def waited(self, seconds: float) -> None:
    """Counts seconds in which a step had to wait for its batch."""
    self._waited_seconds += seconds

  def is_logged(self, step: int) -> bool:
    return step == 1 or step % self._train.log_every_steps == 0 or step == self._train.steps

  def write(self, step: int, sums: dict[str, Any]) -> dict[str, Any]:
    """Records a logged step, counted from 1, and returns its values."""
    sums = jax.device_get(sums)
    (timed_step, timed_at), waited = self._timed_from, self._waited_seconds
    self.restart_clock(step)
    num_steps = max(1, step - timed_step)
    seconds = (self._timed_from[1] - timed_at) / num_steps
    tokens_per_second = self._tokens / max(seconds, 1e-9)
    values = self._summarize(sums)
    values = {
      "loss": values.pop("loss"),
      "learning_rate": float(self._schedule(step - 1)),
      "grad_norm": float(sums["grad_norm"]),
      "tokens": step * self._tokens,
      "tokens_per_second": tokens_per_second,
      "step_seconds": seconds,
      "data_wait_seconds": waited / num_steps,
      "memory_bytes": memory_in_use_bytes(),
      "goodput": self._goodput.account().share,
      "skipped_steps": int(sums["skipped"]),
      **values,
      **{name: float(value) for name, value in sums.items() if name.startswith("grad_norm/")},
    }
    if self._peak_tokens_per_second:
      values["mfu"] = tokens_per_second / self._peak_tokens_per_second / jax.device_count()
    self.latest = values
    self._writer.write(step, values)
    return values
