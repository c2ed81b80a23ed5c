"""A fine-tuned model against its base, as a page."""

from pathlib import Path
from typing import Any

from ultrathink_jax.report import evaluation_plots
from ultrathink_jax.report.data_text import shorten, visible
from ultrathink_jax.report.page import Section, Tile
from ultrathink_jax.report.page import write as write_page

_MAX_TEXT_CHARS = 4000
_MAX_GROUPS = 24  # in a figure; all are in the tables
_MODELS = ("base_model", "finetuned_model")


def write(path: Path, result: dict[str, Any], name: str, pattern: str = "") -> Path:
  """Returns `path`, to which what evaluation_results.json holds is written as a page."""
  groups = {"all documents": result}
  groups |= {f"kind {kind}": pair for kind, pair in result["by_kind"].items()}
  groups |= {f"language {language}": pair for language, pair in result["by_language"].items()}
  shown = dict(list(groups.items())[:_MAX_GROUPS])
  if result["forgetting"]:
    shown["general text"] = groups["general text"] = result["forgetting"]
  sections = [Section("", True, [evaluation_plots.gains({visible(group): pair for group, pair in shown.items()})])]
  if result["routing"]:
    sections.append(Section("Experts", True, [evaluation_plots.routing(result["routing"])]))
  values = {
    "name": name,
    "pattern": pattern,
    "progress": "the fine-tuned model against its base, on held-out documents",
    "compression": None,
    "tiles": _tiles(result),
    "groups": [_group_row(visible(group), pair) for group, pair in groups.items()],
    "sections": sections,
    "layers": [_layer_row(layer) for layer in result["routing"]],
    "completions": _completion_rows(result["completions"]) if result["completions"] else [],
    "samples": [_readable(sample) for sample in result["samples"]],
    "config": [("", [(key, str(value)) for key, value in result["settings"].items()])],
  }
  return write_page(path, "evaluation.html", values)


def _tiles(result: dict[str, Any]) -> list[Tile]:
  base, tuned = (result[model] for model in _MODELS)
  gain = result["improvement"]
  tiles = [
    Tile("loss", f"{tuned['loss']:.4f}", f"base {base['loss']:.4f}, {-gain['loss_percent']:+.1f} %"),
    Tile("perplexity", _number(tuned["perplexity"]), f"base {_number(base['perplexity'])}"),
    Tile("bits per byte", _number(tuned["bits_per_byte"]), f"base {_number(base['bits_per_byte'])}"),
    Tile("next token right", f"{tuned['accuracy']:.1%}", f"base {base['accuracy']:.1%}"),
    Tile("documents better", f"{gain['improved_share']:.0%}", f"of {tuned['documents']:,}"),
  ]
  if result["forgetting"]:
    lost = result["forgetting"]["lost_nats_per_target"]
    tiles.append(
      Tile("general text", f"{lost:+.4f}", "nats per token lost" if lost > 0 else "nats per token, none lost")
    )
  return tiles


def _group_row(name: str, pair: dict[str, Any]) -> dict[str, Any]:
  base, tuned, gain = pair["base_model"], pair["finetuned_model"], pair["improvement"]
  interval = gain["interval"]
  return {
    "name": name,
    "documents": f"{tuned['documents']:,}",
    "tokens": f"{tuned['targets']:,}",
    "loss": (f"{base['loss']:.4f}", f"{tuned['loss']:.4f}"),
    "perplexity": (_number(base["perplexity"]), _number(tuned["perplexity"])),
    "bits": (_number(base["bits_per_byte"]), _number(tuned["bits_per_byte"])),
    "accuracy": (f"{base['accuracy']:.1%}", f"{tuned['accuracy']:.1%}"),
    "gain": f"{gain['nats_per_target']:+.4f}",
    "interval": "-" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}",
    "improved": f"{gain['improved_share']:.0%}",
  }


def _layer_row(layer: dict[str, Any]) -> dict[str, Any]:
  base, tuned = (layer[model] for model in _MODELS)
  return {
    "layer": layer["layer"],
    "divergence": f"{layer['divergence']:.4f}",
    "entropy": (f"{base['entropy']:.3f}", f"{tuned['entropy']:.3f}"),
    "busiest": (f"{base['busiest']:.2f}", f"{tuned['busiest']:.2f}"),
    "variation": (f"{base['variation']:.2f}", f"{tuned['variation']:.2f}"),
    "dead": (f"{base['dead']}", f"{tuned['dead']}"),
    "is_collapsed": layer["is_collapsed"],
  }


def _completion_rows(means: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, int]]:
  """Returns (what is measured, the base model's mean, the fine-tuned model's, over how many completions)."""
  names = {
    "exact_match": "exact match",
    "edit_similarity": "edit similarity",
    "identifier_f1": "F1 of identifiers",
    "is_valid": "the file parses",
  }
  base, tuned = (means[model] for model in _MODELS)
  return [
    (name, f"{base[field]:.3f}", f"{tuned[field]:.3f}", base[f"{field}_of"])
    for field, name in names.items()
    if base[field] is not None
  ]


def _readable(sample: dict[str, Any]) -> dict[str, Any]:
  """Returns a sample with texts that a page can show."""
  shown = lambda text: shorten(visible(text), _MAX_TEXT_CHARS)
  texts = [("what the file says", "", shown(sample["reference"]))]
  for model, title in zip(_MODELS, ("base model", "fine-tuned model"), strict=True):
    scores = sample[model]
    note = "exact" if scores["exact_match"] else f"edit similarity {scores['edit_similarity']:.2f}"
    if scores["is_valid"] is not None:
      note += ", the file parses" if scores["is_valid"] else ", the file does not parse"
    texts.append((title, note, shown(scores["completion"])))
  title = visible(f"{sample['name']} ({sample['kind']}, {sample['language']})")
  return {"title": title, "prompt": shown(sample["prompt"]), "texts": texts}


def _number(value: float | None) -> str:
  """Returns a number with four digits; None is one that is not finite."""
  if value is None:
    return "infinite"
  return f"{value:,.0f}" if 1000 <= value < 1e7 else f"{value:.4g}"
