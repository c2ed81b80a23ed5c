"""What each --mode of the command line does."""

import contextlib
import dataclasses
import difflib
import json
import platform
import shlex
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ultrathink_jax import __version__, api, data
from ultrathink_jax.config import Config
from ultrathink_jax.data import PreparedData
from ultrathink_jax.data.loader import validation_batches
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.evaluate import perplexity
from ultrathink_jax.evaluate.perplexity import Evaluation
from ultrathink_jax.interop.workdir import import_directory
from ultrathink_jax.kernels import backends
from ultrathink_jax.models.counts import count_model, train_flops_per_token
from ultrathink_jax.parallel.devices import Devices, describe_devices, peak_memory_bytes
from ultrathink_jax.parallel.mesh import make_mesh
from ultrathink_jax.parallel.placement import gather, place, rows_here
from ultrathink_jax.parallel.processes import agreed, barrier, is_first, num_processes
from ultrathink_jax.parallel.sharding import tree_shardings
from ultrathink_jax.plan import planning
from ultrathink_jax.recipes import RECIPES
from ultrathink_jax.report import html
from ultrathink_jax.report.describe import describe as description
from ultrathink_jax.report.describe import format_description
from ultrathink_jax.train import loop
from ultrathink_jax.types import Parameters, Recipe

_SAMPLE_PROMPT_TOKENS = 48
_NUM_SAMPLES = 2
_FREE_ON_RESUME = ("mesh", "evaluate", "checkpoint", "generate")  # sections that do not change what is trained


def train(config: Config, workdir: Path, argv: list[str]) -> None:
  """Trains, or resumes, to the last step; then evaluates the whole validation split, samples and writes the report."""
  recipe = _recipe(config)
  devices = describe_devices()
  plan = loop.make_plan(config, recipe, devices)
  if is_first():
    _claim(workdir, config)
  facts = _facts(config, workdir, devices, plan, argv)
  _log(_headline(facts, plan))
  prepared = _prepare(config, workdir)
  facts["data"] = _data_facts(config, prepared)
  evaluation = _evaluator(config, prepared, plan.mesh)
  _write_json(workdir / "run.json", _read_json(workdir / "run.json") | facts)
  outcome = loop.train(
    config,
    recipe,
    plan,
    partial(recipe.source, prepared),
    {"seed": config.train.seed, "data_fingerprint": prepared.fingerprint},
    workdir,
    lambda params: _as_metrics(evaluation(params, config.evaluate.num_batches)),
  )
  result = evaluation(outcome.params, None)
  params = _params_to_sample(plan, devices, outcome.params)
  if is_first():
    _finish(config, workdir, prepared, facts, outcome, result, params)


def evaluate(config: Config, workdir: Path) -> None:
  """Evaluates the newest checkpoint on the whole validation split and writes evaluation.json."""
  prepared = _prepare(config, workdir)
  mesh = make_mesh(config)
  shardings = tree_shardings(mesh, _recipe(config).axes)
  params, step = api.restore_params(workdir, config.model, shardings=shardings)
  result = _evaluator(config, prepared, mesh)(params, None)
  gzip_bits = _gzip_bits_per_byte(prepared)
  _log(_format_result(result, gzip_bits))
  values = {"step": step, **result._asdict(), "gzip_bits_per_byte": gzip_bits, "data": _data_facts(config, prepared)}
  _write_json(workdir / "evaluation.json", values)


def generate(config: Config, workdir: Path, prompts: list[str]) -> None:
  """Prints each prompt with its completion."""
  model = dataclasses.replace(api.load(workdir), sampling=config.generate)
  for prompt, completion in zip(prompts, model.generate(prompts), strict=True):
    print(prompt + completion)


def describe(config: Config, workdir: Path) -> None:
  """Prints the layer table and writes describe.json."""
  print(format_description(config))
  workdir.mkdir(parents=True, exist_ok=True)
  _write_json(workdir / "describe.json", description(config))


def plan(config: Config, workdir: Path, request: planning.Request, output: Path | None) -> None:
  """Prints what a train step needs and takes on devices that are not here, and writes plan.json and `output`."""
  if config.recipe not in RECIPES:
    raise ConfigError(f"recipe={config.recipe!r} is not one of {', '.join(RECIPES)}")
  report, text = planning.make_plan(config, request, _log)
  _log(text)
  workdir.mkdir(parents=True, exist_ok=True)
  _write_json(workdir / "plan.json", report)
  if output is not None:
    output.write_text(f"# Plan: {workdir.name} on {request.topology}\n\n{text}\n")


def import_model(config: Config, source: Path, workdir: Path) -> None:
  """Makes a workdir of a Hugging Face directory, at step 0."""
  config = import_directory(source, workdir, config, workdir / api.DATA_DIRECTORY / "tokenizer")
  count = count_model(config.model)
  _log(f"[import] {source}: {config.model.layers}, {count.total:,} parameters, {count.active:,} active")
  _log(f"[import] train on with --config={workdir / 'config.py'} --workdir={workdir}")


def export_model(workdir: Path, output: Path, family: str | None) -> None:
  """Writes the newest checkpoint as a directory that transformers loads, or says why it is one of ours."""
  api.load(workdir).save_pretrained(output, family=family)


def _recipe(config: Config) -> Recipe:
  if config.recipe not in RECIPES:
    near = difflib.get_close_matches(config.recipe, RECIPES, 1)
    raise ConfigError(
      f"recipe={config.recipe!r} is not one of {', '.join(RECIPES)}" + (f"; {near[0]}?" if near else "")
    )
  return RECIPES[config.recipe](config)


def _prepare(config: Config, workdir: Path) -> PreparedData:
  directory = workdir / api.DATA_DIRECTORY
  prepared = data.prepare(config.data, config.model.vocab_size, directory, _log) if is_first() else None
  barrier("data")
  prepared = prepared or data.open_prepared(directory)
  if not len(prepared.validation):
    raise ConfigError(
      f"data.validation_fraction={config.data.validation_fraction} leaves nothing to evaluate on; choose a larger one"
    )
  return prepared


def _log(text: str) -> None:
  if is_first():
    print(text, flush=True)


def _claim(workdir: Path, config: Config) -> None:
  """Writes config.json, or refuses a workdir that holds a run of another model, data or schedule."""
  path = workdir / "config.json"
  if path.exists():
    before, now = (_flatten(values) for values in (_read_json(path), json.loads(config.to_json())))
    changed = [key for key in now if now[key] != before.get(key) and key.split(".")[0] not in _FREE_ON_RESUME]
    changed = [key for key in changed if key != "train.log_every_steps"]
    if [step.name for step in (workdir / "checkpoints").glob("[0-9]*")] == ["0"]:  # imported, and not trained yet
      changed = [key for key in changed if key.startswith("model.") or key == "data.tokenizer"]
    if changed:
      differences = ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed[:4])
      more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
      raise ConfigError(f"{workdir} holds another run: {differences}{more}; choose another --workdir or the old values")
  workdir.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(".tmp")
  temporary.write_text(config.to_json())
  temporary.replace(path)


def _evaluator(config: Config, prepared: PreparedData, mesh: Mesh) -> Callable[[Parameters, int | None], Evaluation]:
  """Returns (params, number of batches or None for all) -> Evaluation on the validation split, by all processes."""
  sum_of_losses = perplexity.make_sum_of_losses(config.model)
  info = prepared.validation.info
  rows = config.train.batch_size // config.train.accumulation_steps

  def evaluation(params: Parameters, limit: int | None) -> Evaluation:
    length, share = config.train.sequence_length, rows_here(mesh, rows)
    batches = validation_batches(prepared.validation, prepared.tokenizer, rows, length, limit, share)
    placed = (place(mesh, batch, rows) for batch in batches)
    with jax.set_mesh(mesh):
      return perplexity.evaluate(sum_of_losses, params, placed, info.text_bytes / (info.tokens + info.documents))

  return evaluation


def _params_to_sample(plan: loop.Plan, devices: Devices, params: Parameters) -> Parameters | None:
  """Returns parameters that this process can use by itself; None where one device has no room for them."""
  if num_processes() == 1:
    return params
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  if agreed("samples", size + plan.need.parameters <= devices.memory_bytes // 2):
    return gather(plan.mesh, params)
  _log(f"[sample] none: the model, {size / 2**30:.1f} GiB, does not fit on one device; use mode generate")
  return None


def _sample(config: Config, prepared: PreparedData, params: Parameters) -> list[dict[str, str]]:
  """Returns how the model continues the first validation documents."""
  long_enough = [i for i, n in enumerate(prepared.validation.lengths) if n >= 2 * _SAMPLE_PROMPT_TOKENS]
  prompts = [
    prepared.tokenizer.decode(prepared.validation[i][:_SAMPLE_PROMPT_TOKENS].tolist())
    for i in long_enough[:_NUM_SAMPLES]
  ] or [""]
  model = api.Model(config.model, params, prepared.tokenizer, config.generate)
  return [{"prompt": p, "completion": c} for p, c in zip(prompts, model.generate(prompts), strict=True)]


def _finish(
  config: Config,
  workdir: Path,
  prepared: PreparedData,
  facts: dict[str, Any],
  outcome: loop.Outcome,
  result: Evaluation,
  params: Parameters | None,
) -> None:
  """Says and writes down what the run came to."""
  gzip_bits = _gzip_bits_per_byte(prepared)
  samples = [] if params is None else _sample(config, prepared, params)
  for sample in samples:
    _log(f"[sample] the model continues the prompt after |\n{sample['prompt']}|{sample['completion']}")
  _log(_format_result(result, gzip_bits))
  before = _read_json(workdir / "run.json")
  facts["memory"]["peak_bytes"] = peak_memory_bytes()
  facts |= {
    "compile_seconds": outcome.compile_seconds or before.get("compile_seconds", 0.0),
    "train_seconds": outcome.train_seconds + before.get("train_seconds", 0.0),
    "resumed_from_steps": before.get("resumed_from_steps", []) + ([outcome.start_step] if outcome.start_step else []),
    "result": {
      "step": config.train.steps,
      "loss": result.loss,
      "perplexity": result.perplexity,
      "bits_per_byte": result.bits_per_byte,
      "gzip_bits_per_byte": gzip_bits,
    },
    "samples": samples,
  }
  _write_json(workdir / "run.json", facts)
  _log(f"[report] {html.write(workdir)}")


def _facts(config: Config, workdir: Path, devices: Devices, plan: loop.Plan, argv: list[str]) -> dict[str, Any]:
  count = count_model(config.model)
  return {
    "name": workdir.name,
    "command": shlex.join(["python", "-m", "ultrathink_jax.main", *argv[1:]]),
    "model": {
      "layers": config.model.layers,
      "parameters_total": count.total,
      "parameters_active": count.active,
      "flops_per_token": train_flops_per_token(config.model, count, config.train.sequence_length),
    },
    "device": {"kind": devices.kind, "count": devices.count, "platform": devices.platform},
    "processes": num_processes(),
    "versions": {
      "ultrathink_jax": __version__,
      "jax": jax.__version__,
      "flax": version("flax"),
      "python": platform.python_version(),
    },
    "kernels": backends.describe(config.model),
    "mesh": dict(plan.mesh.shape),
    "memory": {"need_bytes": plan.need.total, "have_bytes": devices.memory_bytes},
  }


def _headline(facts: dict[str, Any], plan: loop.Plan) -> str:
  model, device = facts["model"], facts["device"]
  axes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items() if size > 1) or "one device"
  kernels = ", ".join(f"{letter} {name}" for letter, name in facts["kernels"].items())
  return (
    f"[setup] {model['layers']}: {model['parameters_total']:,} parameters, {model['parameters_active']:,} active; "
    f"{device['count']} x {device['kind']} ({axes}); about {plan.need.total / 2**30:.1f} of "
    f"{facts['memory']['have_bytes'] / 2**30:.1f} GiB a device; jax {facts['versions']['jax']}\n"
    f"[setup] kernels: {kernels or 'no choice'}; compiled programs are kept in {jax.config.jax_compilation_cache_dir}"
  )


def _data_facts(config: Config, prepared: PreparedData) -> dict[str, Any]:
  facts: dict[str, Any] = {"source": config.data.source, "fingerprint": prepared.fingerprint}
  for split, store in (("train", prepared.train), ("validation", prepared.validation)):
    info = store.info
    facts |= {
      f"{split}_documents": info.documents,
      f"{split}_tokens": info.tokens,
      f"{split}_bytes": info.text_bytes,
    }
  return facts


def _gzip_bits_per_byte(prepared: PreparedData) -> float:
  info = prepared.validation.info
  return 8 * info.gzip_bytes / info.text_bytes


def _as_metrics(result: Evaluation) -> dict[str, float]:
  return {f"evaluate/{name}": getattr(result, name) for name in ("loss", "perplexity", "bits_per_byte")}


def _format_result(result: Evaluation, gzip_bits: float) -> str:
  relation = "below" if result.bits_per_byte < gzip_bits else "above"
  return (
    f"[result] validation: {result.bits_per_byte:.3f} bits per byte, {relation} gzip -9 ({gzip_bits:.3f}); "
    f"loss {result.loss:.4f}, perplexity {result.perplexity:,.2f} over {result.targets:,} tokens"
  )


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(values, dict):
    return {prefix[:-1]: values}
  flat: dict[str, Any] = {}
  for key, value in values.items():
    flat |= _flatten(value, f"{prefix}{key}.")
  return flat


def _read_json(path: Path) -> dict[str, Any]:
  """Returns the contents of `path`, or {} where there is no readable file."""
  with contextlib.suppress(OSError, json.JSONDecodeError):
    return json.loads(path.read_text())
  return {}


def _write_json(path: Path, values: dict[str, Any]) -> None:
  if not is_first():
    return
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(values, indent=2) + "\n")
  temporary.replace(path)
