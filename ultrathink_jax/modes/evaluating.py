"""Mode evaluate: what a run came to on held-out text, and an adapted one beside its base."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ultrathink_jax import api
from ultrathink_jax.config import Config
from ultrathink_jax.data.prepare import PreparedData, open_prepared
from ultrathink_jax.errors import DataError
from ultrathink_jax.evaluate import comparison
from ultrathink_jax.evaluate.documents import HeldOut, of_store, of_texts, read_samples
from ultrathink_jax.evaluate.harness import run_tasks
from ultrathink_jax.interop.bases import Base, workdir_of
from ultrathink_jax.logs import log
from ultrathink_jax.lora.freezing import find_trained, place, take
from ultrathink_jax.models.language_model import parameter_axes, parameter_shapes
from ultrathink_jax.modes.shared import format_result, make_evaluation, prepare, with_tokenizer, write
from ultrathink_jax.parallel.mesh import make_mesh
from ultrathink_jax.parallel.processes import is_first, num_processes
from ultrathink_jax.parallel.sharding import tree_shardings
from ultrathink_jax.recipes import find_recipe
from ultrathink_jax.report import evaluation as evaluation_page
from ultrathink_jax.report.facts import data_facts, gzip_bits_per_byte
from ultrathink_jax.types import Adapted
from ultrathink_jax.workdir import claim


def evaluate(config: Config, workdir: Path) -> None:
  """Evaluates the newest intact checkpoint on the whole validation split and writes evaluation.json.

  An adapted run is compared with its base too, in evaluation_results.json and evaluation.html, and tasks of
  lm-eval-harness that are named are run.
  """
  config = with_tokenizer(config)
  if is_first() and (workdir / "config.json").exists():
    claim(workdir, config, log)  # other data would replace the tokenizer of a trained model
  prepared = prepare(config, workdir)
  mesh = make_mesh(config)
  adapters = None
  if config.is_adapted:
    adapters, step = api.load_adapters(workdir, config, mesh=mesh, averaged=config.evaluate.averaged)
    params = adapters.weights
  else:
    shardings = tree_shardings(mesh, find_recipe(config).axes)
    like = parameter_shapes(config.model)
    params, step = api.restore_params(workdir, like, shardings=shardings, averaged=config.evaluate.averaged)
  result = make_evaluation(config, prepared, mesh)(params, None)
  gzip_bits = gzip_bits_per_byte(prepared)
  log(format_result(result, gzip_bits))
  values = {"step": step, **result._asdict(), "gzip_bits_per_byte": gzip_bits, "data": data_facts(prepared)}
  if num_processes() == 1:
    model = api.Model(config.model, params, prepared.tokenizer, config.generate, step, adapters)
    if config.evaluate.tasks:
      values["tasks"] = _run_tasks(config, model)
    if adapters is not None:
      _compare(config, workdir, prepared, model, mesh)
  write(workdir / "evaluation.json", values)


def _run_tasks(config: Config, model: api.Model) -> dict[str, Any]:
  settings, rows = config.evaluate, config.train.micro_batch_size
  folder = Path(settings.tasks_folder) if settings.tasks_folder else None
  found = run_tasks(model, settings.tasks, config.train.sequence_length, rows, folder)
  for name, metrics in found.items():
    log(f"[task] {name}: {', '.join(f'{metric} {value:.4g}' for metric, value in metrics.items())}")
  return found


def _compare(config: Config, workdir: Path, prepared: PreparedData, model: api.Model, mesh: Mesh) -> None:
  """Compares an adapted run with its base and writes what it finds."""
  settings = comparison.Settings(
    config.train.sequence_length,
    config.train.micro_batch_size,
    config.evaluate.samples,
    config.generate,
    collapse_share=config.advice.collapse_share,
  )
  documents = _documents(config, workdir, prepared)
  general = _about_as_many(_general(config, model), documents)
  kinds = f" and {len(general)} general ones" if general else ""
  log(f"[evaluate] {len(documents)} held-out documents{kinds}, by the base and by what was made of it")
  base = _base(config, model.params, mesh)
  found = comparison.compare(config.model, base, model.params, prepared.tokenizer, documents, general, settings)
  for line in found.lines():
    log(line)
  values = found.as_json()
  write(workdir / "evaluation_results.json", values)
  (workdir / "evaluation_samples.md").write_text(found.markdown())
  page = evaluation_page.write(workdir / "evaluation.html", values, workdir.resolve().name, config.model.layers)
  log(f"[report] {page}")


def _about_as_many(general: list[HeldOut], documents: list[HeldOut]) -> list[HeldOut]:
  """Returns the first general documents that hold as many tokens as the others, or 20,000: more would tell no more."""
  left, chosen = max(20_000, sum(len(each.sequence.tokens) for each in documents)), []
  for each in general:
    if len(each.sequence.tokens) <= left:
      left -= len(each.sequence.tokens)
      chosen.append(each)
  return chosen


def _base(config: Config, weights: Adapted, mesh: Mesh) -> Adapted:
  """Returns the base in the arrays of what was made of it, but for parameters that were trained in full."""
  trained = find_trained(config.model, config.train.trainable)
  params = weights.params
  if trained:
    whole = Base(config.checkpoint.init_from, config.model).load(tree_shardings(mesh, parameter_axes(config.model)))
    params = place(trained, params, take(trained, whole))
  return weights._replace(params=params, lora={})


def _documents(config: Config, workdir: Path, prepared: PreparedData) -> list[HeldOut]:
  """Returns held-out documents: the samples of source trees kept apart as tests, else those of the validation split."""
  limit = config.evaluate.documents or None
  built = sorted((workdir / api.DATA_DIRECTORY).glob("code-*/test.jsonl"))
  samples = [
    sample for path in built if path.stat().st_size for sample in read_samples(path, prepared.tokenizer, limit)
  ]
  return samples or of_store(prepared.validation, prepared.tokenizer, limit)


def _general(config: Config, model: api.Model) -> list[HeldOut]:
  """Returns other documents, by which is told what was forgotten: those held out from the base's own training."""
  name, limit = config.evaluate.general, config.evaluate.documents or None
  if name == "base":
    workdir = workdir_of(Path(config.checkpoint.init_from))
    if workdir is None or not (workdir / api.DATA_DIRECTORY / "prepared.json").exists():
      log("[evaluate] the base has no held-out text of its own; evaluate.general=FILE says what is forgotten")
      return []
    return of_store(open_prepared(workdir / api.DATA_DIRECTORY).validation, model.tokenizer, limit)
  if not name:
    return []
  path = Path(name)
  if path.suffix == ".jsonl":
    return read_samples(path, model.tokenizer, limit)
  try:
    return of_texts([path.read_text()], model.tokenizer)
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f"evaluate.general={name} cannot be read: {error}; give a text or a JSONL file") from error
