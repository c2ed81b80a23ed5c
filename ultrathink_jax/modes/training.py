"""Mode train: a whole run, from its configuration to its report."""

import contextlib
import dataclasses
import traceback
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ultrathink_jax import api
from ultrathink_jax.config import Config
from ultrathink_jax.data.loader import training_loader
from ultrathink_jax.data.prepare import PreparedData
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.evaluate.perplexity import Evaluation
from ultrathink_jax.interop.bases import Base
from ultrathink_jax.interruption import Interruption
from ultrathink_jax.locking import workdir_lock
from ultrathink_jax.logs import log
from ultrathink_jax.lora import coverage
from ultrathink_jax.modes.shared import find_base, format_result, make_evaluation, prepare, with_tokenizer, write
from ultrathink_jax.optimizers.schedules import format_length, resolve_steps
from ultrathink_jax.parallel.devices import Devices, describe_devices, peak_memory_bytes
from ultrathink_jax.parallel.placement import gather
from ultrathink_jax.parallel.processes import agreed, is_first, num_processes, said_by_first
from ultrathink_jax.recipes import find_recipe
from ultrathink_jax.report import html
from ultrathink_jax.report.facts import data_facts, gzip_bits_per_byte, headline, run_facts
from ultrathink_jax.testing import faults
from ultrathink_jax.train import fitting, loop
from ultrathink_jax.train.goodput import Goodput, format_account
from ultrathink_jax.train.loop import Outcome, Surroundings
from ultrathink_jax.train.plan import Plan, make_plan
from ultrathink_jax.train.profiling import Profiler
from ultrathink_jax.train.sinks.services import require_sinks
from ultrathink_jax.train.supervisor import Supervisor
from ultrathink_jax.types import Parameters
from ultrathink_jax.workdir import claim, read_json

_SAMPLE_PROMPT_TOKENS = 48
_NUM_SAMPLES = 2


class Invocation(NamedTuple):
  """How mode train was asked for, beside its configuration.

  Attributes:
    argv: the command line.
    interruption: what answers signals.
    force: whether to go on by a configuration that differs from the run's.
    allow_fresh_start: whether to begin anew where every checkpoint is damaged.
    profile_steps: FIRST:LAST, steps to trace.
  """

  argv: list[str]
  interruption: Interruption
  force: bool = False
  allow_fresh_start: bool = False
  profile_steps: str | None = None


def train(config: Config, workdir: Path, invocation: Invocation) -> None:
  """Trains, or resumes, to the last step; then evaluates the whole validation split, samples and writes the report.

  Where a device runs out of memory, the run goes on once with smaller micro-batches and more recomputation.
  """
  require_sinks(config.log)
  base = find_base(config)  # before the workdir is anybody's
  config = with_tokenizer(config)
  invocation.interruption.stop_seconds = config.checkpoint.stop_seconds
  hang_seconds = config.train.hang_seconds
  with (
    workdir_lock(workdir) if is_first() else contextlib.nullcontext(),
    Supervisor(workdir, hang_seconds, invocation.interruption) as supervisor,
  ):
    if is_first():
      claim(workdir, config, log, invocation.force)
    run = _Run(config, workdir, invocation, supervisor, base)
    while True:
      try:
        run.run()
        return
      except Exception as error:
        if not fitting.is_out_of_memory(error):
          raise
        run.shrink(error)
        traceback.clear_frames(error.__traceback__)  # which hold the state that did not fit


class _Run:
  """A run in this process: what it is found to be, step by step."""

  def __init__(self, config: Config, workdir: Path, invocation: Invocation, supervisor: Supervisor, base: Base | None):
    self.config, self._base = config, base
    self._workdir, self._invocation, self._supervisor = workdir, invocation, supervisor
    self._goodput = Goodput(workdir)
    self._profiler = Profiler(invocation.profile_steps, workdir, log)
    self._faults = faults.from_environment(config.train.seed, workdir)
    self._prepared: PreparedData | None = None
    self._has_shrunk = False

  def run(self) -> None:
    devices = self._resolve()
    config, workdir = self.config, self._workdir
    recipe = self._faults.wrap(find_recipe(config))
    plan = make_plan(config, recipe, devices)
    facts = run_facts(config, workdir, devices, plan, self._invocation.argv)
    log(headline(facts, plan))
    if config.is_adapted:
      log("\n".join(f"[lora] {line}" for line in coverage.describe(config)))
    prepared = self._data()
    log(f"[length] {format_length(config.train, config.train.steps, training_loader(config, prepared).rows_per_epoch)}")
    facts["data"] = data_facts(prepared)
    evaluation, base = make_evaluation(config, prepared, plan.mesh), self._base
    write(workdir / "run.json", read_json(workdir / "run.json") | facts)
    around = Surroundings(
      workdir,
      partial(recipe.source, prepared),
      {"seed": config.train.seed, "data_fingerprint": prepared.fingerprint}
      | ({} if base is None else {"base": base.fingerprint}),
      lambda params: _as_metrics(evaluation(params, config.evaluate.num_batches)),
      self._supervisor,
      self._faults,
      self._profiler,
      self._goodput,
      base.load if base is not None else lambda shardings: None,
      self._invocation.allow_fresh_start,
    )
    outcome = loop.train(config, recipe, plan, around)
    result = evaluation(outcome.params, None)
    params = _params_to_sample(plan, devices, outcome.params)
    if is_first():
      self._finish(facts, outcome, result, params)

  def shrink(self, error: Exception) -> None:
    """Makes micro-batches smaller, once, after a device ran out of memory. Raises ConfigError where that is no way."""
    words = " ".join(str(error).split())[:200]
    can_shrink = num_processes() == 1 and not self._has_shrunk
    smaller = fitting.smaller(self.config) if can_shrink else None
    if smaller is None:
      raise ConfigError(f"out of memory: {words}; {fitting.what_to_try(self.config)}") from error
    self.config, self._has_shrunk = smaller, True
    log(
      f"[memory] out of memory: {words}; the run goes on from its last checkpoint, once, with "
      f"train.accumulation_steps={smaller.train.accumulation_steps} and model.remat={smaller.model.remat!r}"
    )

  def _resolve(self) -> Devices:
    """Settles what the configuration leaves open, the same in all processes, and returns the devices."""
    config = self.config
    rows = None
    if config.train.epochs:
      rows = training_loader(config, self._data()).rows_per_epoch
    config = _with_train(config, steps=resolve_steps(config.train, rows))
    devices = describe_devices()
    if self._has_shrunk:
      devices = fitting.unlimited(devices)
    if not config.train.accumulation_steps:
      memory_bytes = int(said_by_first("memory", str(devices.memory_bytes)))
      devices = dataclasses.replace(devices, memory_bytes=memory_bytes)
      before = said_by_first("accumulation", str(read_json(self._workdir / "run.json").get("accumulation_steps", 0)))
      config = fitting.fit(config, find_recipe(config), make_plan, devices, log, int(before))
      devices = fitting.unlimited(devices)
    self.config = config
    return devices

  def _data(self) -> PreparedData:
    if self._prepared is None:
      self._prepared = prepare(self.config, self._workdir)
    return self._prepared

  def _finish(self, facts: dict[str, Any], outcome: Outcome, result: Evaluation, params: Parameters | None) -> None:
    """Says and writes down what the run came to."""
    config, workdir, prepared = self.config, self._workdir, self._data()
    gzip_bits = gzip_bits_per_byte(prepared)
    samples = [] if params is None else _sample(config, prepared, params)
    for sample in samples:
      log(f"[sample] the model continues the prompt after |\n{sample['prompt']}|{sample['completion']}")
    log(format_result(result, gzip_bits))
    before = read_json(workdir / "run.json")
    account = self._goodput.account()
    facts["memory"]["peak_bytes"] = peak_memory_bytes()
    facts |= {
      "compile_seconds": outcome.compile_seconds or before.get("compile_seconds", 0.0),
      "train_seconds": outcome.train_seconds + before.get("train_seconds", 0.0),
      "goodput": {"share": account.share, "elapsed_seconds": account.elapsed, "lost_seconds": account.lost},
      "resumed_from_steps": before.get("resumed_from_steps", []) + ([outcome.start_step] if outcome.start_step else []),
      "result": {
        "step": outcome.step if outcome.best_step is None else outcome.best_step,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "gzip_bits_per_byte": gzip_bits,
      },
      "samples": samples,
    }
    write(workdir / "run.json", facts)
    log(f"[goodput] {format_account(account).removeprefix('goodput ')}")
    log(f"[report] {html.write(workdir)}")


def _with_train(config: Config, **changes: Any) -> Config:
  return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def _params_to_sample(plan: Plan, devices: Devices, params: Parameters) -> Parameters | None:
  """Returns parameters that this process can use by itself; None where one device has no room for them."""
  if num_processes() == 1:
    return params
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  if agreed("samples", size + plan.need.parameters <= devices.memory_bytes // 2):
    return gather(plan.mesh, params)
  log(f"[sample] none: the model, {size / 2**30:.1f} GiB, does not fit on one device; use mode generate")
  return None


def _sample(config: Config, prepared: PreparedData, params: Parameters) -> list[dict[str, str]]:
  """Returns how the model continues the first validation documents."""
  long_enough = [i for i, n in enumerate(prepared.validation.lengths) if n >= 2 * _SAMPLE_PROMPT_TOKENS]
  prompts = [
    prepared.tokenizer.decode(prepared.validation.example(i).tokens[:_SAMPLE_PROMPT_TOKENS].tolist())
    for i in long_enough[:_NUM_SAMPLES]
  ] or [""]
  model = api.Model(config.model, params, prepared.tokenizer, config.generate)
  return [{"prompt": p, "completion": c} for p, c in zip(prompts, model.generate(prompts), strict=True)]


def _as_metrics(result: Evaluation) -> dict[str, float]:
  return {f"evaluate/{name}": getattr(result, name) for name in ("loss", "perplexity", "bits_per_byte")}
