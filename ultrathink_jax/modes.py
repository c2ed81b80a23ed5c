"""What each --mode of the command line does."""

import dataclasses
import difflib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ultrathink_jax import api
from ultrathink_jax.config import Config
from ultrathink_jax.data import prepare as preparing
from ultrathink_jax.data.loader import validation_batches
from ultrathink_jax.data.prepare import PreparedData
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.evaluate import perplexity
from ultrathink_jax.evaluate.perplexity import Evaluation
from ultrathink_jax.interop.workdir import import_directory
from ultrathink_jax.models.counts import count_model
from ultrathink_jax.parallel.devices import Devices, describe_devices, peak_memory_bytes
from ultrathink_jax.parallel.mesh import make_mesh
from ultrathink_jax.parallel.placement import gather, place, rows_here
from ultrathink_jax.parallel.processes import agreed, barrier, is_first, num_processes
from ultrathink_jax.parallel.sharding import tree_shardings
from ultrathink_jax.plan import planning
from ultrathink_jax.recipes import RECIPES
from ultrathink_jax.report import data_page, html
from ultrathink_jax.report.data import inspect
from ultrathink_jax.report.data_text import format_inspection, marks_for
from ultrathink_jax.report.describe import describe as description
from ultrathink_jax.report.describe import format_description
from ultrathink_jax.report.facts import data_facts, gzip_bits_per_byte, headline, run_facts
from ultrathink_jax.train import loop
from ultrathink_jax.types import Parameters, Recipe
from ultrathink_jax.workdir import claim, read_json, write_json

_SAMPLE_PROMPT_TOKENS = 48
_NUM_SAMPLES = 2


def train(config: Config, workdir: Path, argv: list[str]) -> None:
  """Trains, or resumes, to the last step; then evaluates the whole validation split, samples and writes the report."""
  recipe = _recipe(config)
  devices = describe_devices()
  plan = loop.make_plan(config, recipe, devices)
  if is_first():
    claim(workdir, config)
  facts = run_facts(config, workdir, devices, plan, argv)
  _log(headline(facts, plan))
  prepared = _prepare(config, workdir)
  facts["data"] = data_facts(prepared)
  evaluation = _evaluator(config, prepared, plan.mesh)
  _write(workdir / "run.json", read_json(workdir / "run.json") | facts)
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
  if is_first() and (workdir / "config.json").exists():
    claim(workdir, config)  # other data would replace the tokenizer of a trained model
  prepared = _prepare(config, workdir)
  mesh = make_mesh(config)
  shardings = tree_shardings(mesh, _recipe(config).axes)
  params, step = api.restore_params(workdir, config.model, shardings=shardings)
  result = _evaluator(config, prepared, mesh)(params, None)
  gzip_bits = gzip_bits_per_byte(prepared)
  _log(_format_result(result, gzip_bits))
  values = {"step": step, **result._asdict(), "gzip_bits_per_byte": gzip_bits, "data": data_facts(prepared)}
  _write(workdir / "evaluation.json", values)


def generate(config: Config, workdir: Path, prompts: list[str]) -> None:
  """Prints each prompt with its completion."""
  model = dataclasses.replace(api.load(workdir), sampling=config.generate)
  for prompt, completion in zip(prompts, model.generate(prompts), strict=True):
    print(prompt + completion)


def data(config: Config, workdir: Path) -> None:
  """Prepares what training reads, prints what it is like and writes data.json and data.html."""
  if not is_first():
    return
  if (workdir / "config.json").exists():
    claim(workdir, config)  # other data would replace the tokenizer of a trained model
  directory = workdir / api.DATA_DIRECTORY
  prepared = preparing.prepare(config.data, config.model.vocab_size, directory, _log, config.quality, config.code)
  found = inspect(config, prepared, directory, workdir.resolve().name)
  _write(workdir / "data.json", found)
  page = data_page.write(workdir / "data.html", found, config)
  text = format_inspection(found, marks_for(sys.stdout))
  _log(text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))  # a terminal may lack characters
  _log(f"[data] {page}")


def tokenizer(config: Config, workdir: Path) -> None:
  """Trains the tokenizer that training would use, or finds it, and says where it lies."""
  if (workdir / "config.json").exists():
    claim(workdir, config)
  directory = workdir / api.DATA_DIRECTORY
  made = preparing.prepare_tokenizer(config.data, config.model.vocab_size, directory, _log, config.quality, config.code)
  _log(
    f"[tokenizer] {made.vocab_size:,} tokens in {directory / 'tokenizer'}; use it elsewhere by --config.data.tokenizer"
  )


def describe(config: Config, workdir: Path) -> None:
  """Prints the layer table and writes describe.json."""
  print(format_description(config))
  workdir.mkdir(parents=True, exist_ok=True)
  _write(workdir / "describe.json", description(config))


def plan(config: Config, workdir: Path, request: planning.Request, output: Path | None) -> None:
  """Prints what a train step needs and takes on devices that are not here, and writes plan.json and `output`."""
  report, text = planning.make_plan(config, request, _log)
  _log(text)
  workdir.mkdir(parents=True, exist_ok=True)
  _write(workdir / "plan.json", report)
  if output is not None:
    output.write_text(f"# Plan: {workdir.name}\n\n{text}\n")


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
  prepared = None
  if is_first():
    prepared = preparing.prepare(config.data, config.model.vocab_size, directory, _log, config.quality, config.code)
  barrier("data")
  prepared = prepared or preparing.open_prepared(directory)
  if not len(prepared.validation):
    raise ConfigError(
      f"data.validation_fraction={config.data.validation_fraction} leaves nothing to evaluate on; choose a larger one"
    )
  return prepared


def _log(text: str) -> None:
  if is_first():
    print(text, flush=True)


def _write(path: Path, values: dict[str, Any]) -> None:
  if is_first():
    write_json(path, values)


def _evaluator(config: Config, prepared: PreparedData, mesh: Mesh) -> Callable[[Parameters, int | None], Evaluation]:
  """Returns (params, number of batches or None for all) -> Evaluation on the validation split, by all processes."""
  sum_of_losses = perplexity.make_sum_of_losses(config.model)
  store = prepared.validation
  rows = config.train.micro_batch_size

  def evaluation(params: Parameters, limit: int | None) -> Evaluation:
    length, share = config.train.sequence_length, rows_here(mesh, rows)
    batches = validation_batches(store, prepared.tokenizer, rows, length, limit, share)
    placed = (place(mesh, batch, rows) for batch in batches)
    with jax.set_mesh(mesh):
      return perplexity.evaluate(sum_of_losses, params, placed, store.text_bytes / (store.num_tokens + len(store)))

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
    prepared.tokenizer.decode(prepared.validation.example(i).tokens[:_SAMPLE_PROMPT_TOKENS].tolist())
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
  gzip_bits = gzip_bits_per_byte(prepared)
  samples = [] if params is None else _sample(config, prepared, params)
  for sample in samples:
    _log(f"[sample] the model continues the prompt after |\n{sample['prompt']}|{sample['completion']}")
  _log(_format_result(result, gzip_bits))
  before = read_json(workdir / "run.json")
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
  _write(workdir / "run.json", facts)
  _log(f"[report] {html.write(workdir)}")


def _as_metrics(result: Evaluation) -> dict[str, float]:
  return {f"evaluate/{name}": getattr(result, name) for name in ("loss", "perplexity", "bits_per_byte")}


def _format_result(result: Evaluation, gzip_bits: float) -> str:
  relation = "below" if result.bits_per_byte < gzip_bits else "above"
  return (
    f"[result] validation: {result.bits_per_byte:.3f} bits per byte, {relation} gzip -9 ({gzip_bits:.3f}); "
    f"loss {result.loss:.4f}, perplexity {result.perplexity:,.2f} over {result.targets:,} tokens"
  )
