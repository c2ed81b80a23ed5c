"""Lines that say when a run looks wrong, and what to try.

Everything is judged by the logged metrics of several steps, never by one that may be an outlier, except for what is
wrong by itself: steps that were not applied, and norms far above all of late.
"""

import math
import shutil
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from ultrathink_jax.config.watching import AdviceConfig

_RECENT = 50  # logged steps that are looked at
_CURVE = 600  # points of the loss that are kept; of a longer curve each stands for two
_FEW = 5  # that make a first, and a latest, mean
_ENOUGH = 20  # from which on deviations mean something
_QUIET_STEPS = 500  # before a rule speaks again; each time twice as long
_WARMUP_RISE = 0.1  # of the loss, as a share
_WAITING_SHARE = 0.2  # of step time that goes into waiting for data
_FULL_SHARE = 0.9  # of a machine's memory, or a disk
_LEAST_LOSS = 0.1  # below which a loss that stays is no fault


class Advisor:
  """Looks at each logged step. `workdir` is where the disk must not be full; None looks at no machine."""

  def __init__(self, config: AdviceConfig, workdir: Path | None = None):
    self._config, self._workdir = config, workdir
    self._losses: deque[int | float] = deque(maxlen=_RECENT)
    self._curve: list[tuple[int, int | float]] = []  # steps and losses, as far back as the flat rule looks
    self._rates: deque[int | float] = deque(maxlen=_RECENT)
    self._norms: deque[int | float] = deque(maxlen=_RECENT)
    self._waits: deque[int | float] = deque(maxlen=_FEW)
    self._routings: deque[Mapping[str, Any]] = deque(maxlen=_FEW)
    self._peak_rate = 0.0
    self._skipped: int | None = None
    self._quiet: dict[str, tuple[int, int]] = {}  # rule -> (step until which it is silent, how long it was)

  def after(self, step: int, values: Mapping[str, Any]) -> list[str]:
    """Returns what is worth saying after a logged step, whose metrics are `values`; mostly nothing."""
    self._record(step, values)
    rules: dict[str, Callable[[], str | None]] = {
      "skipped": lambda: self._skipped_steps(values),
      "explosion": self._explosion,
      "warmup": self._warmup,
      "oscillation": self._oscillation,
      "flat": lambda: self._flat(step),
      "collapse": self._collapse,
      "dead": self._dead,
      "saturation": self._saturation,
      "data": self._data_bound,
      "memory": self._memory,
      "disk": self._disk,
    }
    lines = []
    for name, rule in rules.items():
      text = rule() if self._may_speak(name, step) else None
      if text:
        self._silence(name, step)
        lines.append(f"[advice] step={step} {text}")
    if self._norms and _is_explosion(self._norms, self._config.explosion_ratio):
      self._norms.pop()  # an outlier is no measure of what follows
    self._skipped = int(values.get("skipped_steps", 0))
    return lines

  def rewind(self, step: int) -> None:
    """Forgets what was seen after `step`, from which the run goes on once more."""
    self._curve = [(at, loss) for at, loss in self._curve if at <= step]
    for recent in (self._losses, self._rates, self._norms, self._waits, self._routings):
      recent.clear()
    self._skipped = None
    self._quiet = {name: (min(until, step + quiet), quiet) for name, (until, quiet) in self._quiet.items()}

  def _record(self, step: int, values: Mapping[str, Any]) -> None:
    loss, norm, rate = values["loss"], values["grad_norm"], values["learning_rate"]
    if math.isfinite(loss):
      self._losses.append(loss)
      self._curve.append((step, loss))
    if math.isfinite(norm):
      self._norms.append(norm)
    self._rates.append(rate)
    self._peak_rate = max(self._peak_rate, rate)
    if len(self._curve) > _CURVE:
      since = step - self._flat_window(step)
      pairs = zip(self._curve[::2], self._curve[1::2], strict=False)
      self._curve = [(b[0], (a[1] + b[1]) / 2) for a, b in pairs if b[0] >= since]
    if values.get("step_seconds"):
      self._waits.append(values.get("data_wait_seconds", 0.0) / values["step_seconds"])
    if "moe/entropy" in values:
      self._routings.append(values)

  def _may_speak(self, rule: str, step: int) -> bool:
    return step >= self._quiet.get(rule, (0, 0))[0]

  def _silence(self, rule: str, step: int) -> None:
    quiet = 2 * self._quiet[rule][1] if rule in self._quiet else _QUIET_STEPS
    self._quiet[rule] = (step + quiet, quiet)

  def _skipped_steps(self, values: Mapping[str, Any]) -> str | None:
    skipped = int(values.get("skipped_steps", 0))
    new = skipped - (self._skipped if self._skipped is not None else skipped)
    is_finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
    if new <= 0 and is_finite:
      return None
    what = f"{new} steps were not applied" if new > 0 else "loss or gradient is not finite"
    return (
      f"{what} since the last line: if it goes on, lower optimizer.learning_rate or optimizer.clip_norm, lengthen "
      f"optimizer.warmup_steps, or set model.dtype=float32"
    )

  def _explosion(self) -> str | None:
    ratio = self._config.explosion_ratio
    if not _is_explosion(self._norms, ratio):
      return None
    times = self._norms[-1] / statistics.median(list(self._norms)[:-1])
    return (
      f"the gradient norm is {self._norms[-1]:.3g}, {times:.0f} times its median of late: try a lower "
      f"optimizer.learning_rate, optimizer.clip_norm={_below(self._norms)}, or optimizer.guard.spike_sigmas=6"
    )

  def _warmup(self) -> str | None:
    losses = list(self._losses)
    if not self._is_warming_up() or len(losses) < 2 * _FEW:
      return None
    best = min(statistics.fmean(losses[i : i + _FEW]) for i in range(len(losses) - _FEW))
    now = statistics.fmean(losses[-_FEW:])
    if now < best * (1 + _WARMUP_RISE):
      return None
    return (
      f"the loss rose from {best:.3f} to {now:.3f} while the learning rate warms up: lengthen optimizer.warmup_steps "
      f"or lower optimizer.learning_rate"
    )

  def _is_warming_up(self) -> bool:
    return len(self._rates) > _FEW and self._rates[-1] > self._rates[-_FEW]

  def _oscillation(self) -> str | None:
    losses = list(self._losses)
    ratio = self._config.oscillation_ratio
    if not ratio or len(losses) < _ENOUGH:
      return None
    share = _deviation_around_trend(losses) / statistics.fmean(losses)
    if share <= ratio:
      return None
    return (
      f"the loss swings by {share:.0%} around its trend: lower optimizer.learning_rate, or raise train.batch_size "
      f"(with train.accumulation_steps where memory is short) or optimizer.beta2"
    )

  def _flat_window(self, step: int) -> int:
    """Returns over how many steps the loss should fall: more later, as the fall slows down in every run."""
    return max(self._config.flat_steps, step // 2)

  def _flat(self, step: int) -> str | None:
    """Says so where the loss stays while the learning rate is high; that it does where the rate has fallen is due."""
    window = self._flat_window(step)
    since = [(at, loss) for at, loss in self._curve if at > step - window]
    if not self._config.flat_steps or len(since) < _ENOUGH or since[-1][0] - since[0][0] < 0.9 * window:
      return None
    if self._rates[-1] < 0.5 * self._peak_rate:
      return None
    third = len(since) // 3
    before, now = (statistics.fmean(loss for _, loss in part) for part in (since[:third], since[-third:]))
    fall = 1 - now / before if before > 0 else 0.0
    if fall >= self._config.flat_ratio or before < _LEAST_LOSS:
      return None
    return (
      f"the loss is {now:.3f}, and was {before:.3f} about {window * 2 // 3:,} steps ago: try a higher or lower "
      f"optimizer.learning_rate, check the data with --mode=data, or end here"
    )

  def _is_early(self) -> bool:
    """Returns whether routers may still find their balance by themselves."""
    return len(self._rates) < _ENOUGH or len(self._routings) < _FEW

  def _collapse(self) -> str | None:
    share = self._config.collapse_share
    if not share or self._is_early():
      return None
    seen = [values["moe/max_expert"] for values in self._routings]
    # Of few experts one has a large share by right.
    if min(seen) <= max(share, 2 / _num_experts(self._routings[-1])):
      return None
    return (
      f"one expert takes {seen[-1]:.0%} of its layer's choices: raise loss.load_balance_weight, set "
      f"model.router_bias=True, or add model.router_noise"
    )

  def _dead(self) -> str | None:
    if not self._config.collapse_share or self._is_early() or self._is_warming_up():
      return None
    fewest = min(values.get("moe/dead", 0) for values in self._routings)
    if not fewest:
      return None
    return (
      f"{fewest} experts get less than a tenth of an even share of the tokens: raise loss.load_balance_weight, set "
      f"model.router_bias=True, or choose fewer model.num_experts"
    )

  def _saturation(self) -> str | None:
    least = self._config.saturation_entropy
    if self._is_early():
      return None
    seen = [values["moe/entropy"] for values in self._routings]
    if max(seen) >= least:
      return None
    return (
      f"routing is saturated, with an entropy of the load of {seen[-1]:.2f} of 1: raise loss.load_balance_weight or "
      f"loss.router_z_weight, or lower the routers' rate with optimizer.rate_multipliers=('*router*=0.1',)"
    )

  def _data_bound(self) -> str | None:
    if len(self._waits) < _FEW or statistics.fmean(self._waits) < _WAITING_SHARE:
      return None
    return (
      f"{statistics.fmean(self._waits):.0%} of the time goes into waiting for data: raise data.workers, put the "
      f"workdir on a faster disk, or give the machine more cores"
    )

  def _memory(self) -> str | None:
    memory = psutil.virtual_memory()
    if self._workdir is None or memory.percent < 100 * _FULL_SHARE:
      return None
    return (
      f"{memory.percent:.0f}% of the machine's memory is in use, {memory.available / 2**30:.1f} GiB are left: lower "
      f"data.workers or train.batch_size before the system ends the run"
    )

  def _disk(self) -> str | None:
    if self._workdir is None:
      return None
    disk = shutil.disk_usage(self._workdir)
    if disk.used < _FULL_SHARE * (disk.used + disk.free):
      return None
    return (
      f"the disk of {self._workdir} is {disk.used / (disk.used + disk.free):.0%} full, {disk.free / 2**30:.1f} GiB are "
      f"left: make room, or keep fewer checkpoints with checkpoint.keep_last and checkpoint.keep_every_steps"
    )


def _is_explosion(norms: deque[int | float], ratio: int | float) -> bool:
  """Returns whether the last norm is `ratio` times the median of those before."""
  if not ratio or len(norms) <= _FEW:
    return False
  return norms[-1] > ratio * statistics.median(list(norms)[:-1]) > 0


def _below(norms: deque[int | float]) -> str:
  """Returns a limit of the norm that clips what is above twice the usual."""
  return f"{2 * statistics.median(norms):.1g}"


def _deviation_around_trend(values: list[int | float]) -> int | float:
  """Returns the standard deviation around a straight line."""
  slope, intercept = statistics.linear_regression(range(len(values)), values)
  return math.sqrt(statistics.fmean((y - intercept - slope * x) ** 2 for x, y in enumerate(values)))


def _num_experts(values: Mapping[str, Any]) -> int:
  """Returns how many experts a layer has, infinitely many where the load is not known."""
  return min((len(shares) for shares in values.get("moe/load", {}).values()), default=10**9)
