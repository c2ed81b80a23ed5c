"""The layer table of a model and what it takes to train and run it, as text and as numbers."""

from typing import Any

from ultrathink_jax.config import Config, TrainConfig
from ultrathink_jax.lora import coverage
from ultrathink_jax.lora.coverage import count_trained, flops_per_token
from ultrathink_jax.models.counts import ModelCount, count_model
from ultrathink_jax.optimizers.schedules import resolve_steps

_ADAMW_BYTES = 16  # a parameter, its gradient and two moments, float32


def describe(config: Config) -> dict[str, Any]:
  """Returns the contents of describe.json: counts, FLOPs per token, bytes."""
  count = count_model(config.model)
  return {
    "layers": config.model.layers,
    "layer_table": [vars(line) for line in count.layers],
    "embedding_parameters": count.embedding,
    "unembedding_parameters": count.unembedding,
    "parameters_total": count.total,
    "parameters_active": count.active,
    "train_flops_per_token": flops_per_token(config, count),
    "parameter_bytes": 4 * count.total,
    "train_state_bytes": _ADAMW_BYTES * count.total,
    "cache_bytes_per_token": count.cache_bytes_per_token,
    "cache_bytes_fixed": count.cache_bytes_fixed,
    "tokens_per_step": config.train.batch_size * config.train.sequence_length,
    **_adapted(config),
  }


def _adapted(config: Config) -> dict[str, Any]:
  if not config.is_adapted:
    return {}
  trained, total = count_trained(config)
  return {"parameters_trained": trained, "parameters_with_adapters": total, "trained": coverage.describe(config)}


def format_description(config: Config) -> str:
  """Returns the description as a table for a terminal."""
  count = count_model(config.model)
  flops = flops_per_token(config, count)
  rows = [("layer", "count", "parameters each", "active each", "parameters")]
  rows += [
    (f"{line.letter} {line.name}", line.count, line.parameters, line.active_parameters, line.count * line.parameters)
    for line in count.layers
  ]
  rows.append(("embedding", 1, count.embedding, count.embedding, count.embedding))
  if count.unembedding:
    rows.append(("unembedding", 1, count.unembedding, count.unembedding, count.unembedding))
  rows.append(("final norm", 1, count.final_norm, count.final_norm, count.final_norm))
  lines = [f"layers    {config.model.layers}", "", *_align(rows), "", *_totals(config, count, flops)]
  if config.is_adapted:
    lines += ["", *coverage.describe(config)]
  return "\n".join(lines)


def _align(rows: list[tuple[Any, ...]]) -> list[str]:
  cells = [[cell if isinstance(cell, str) else f"{cell:,}" for cell in row] for row in rows]
  widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
  align = lambda row: "  ".join(
    [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
  )
  return [align(row) for row in cells]


def _length(train: TrainConfig, tokens_per_step: int) -> str:
  """Returns how long a run is, as far as that can be said without its data."""
  if train.epochs and not train.tokens:
    return f"until the data has been read {train.epochs:g} times (train.epochs)"
  steps = resolve_steps(train, rows_per_epoch=None)
  return f"{tokens_per_step * steps:,} in {steps:,} steps"


def _totals(config: Config, count: ModelCount, flops: float) -> list[str]:
  tokens = config.train.batch_size * config.train.sequence_length
  gib = lambda size: f"{size / 2**30:,.1f} GiB"
  return [
    f"total     {count.total:,} parameters",
    f"active    {count.active:,} parameters for each token ({count.active / count.total:.1%})",
    f"compute   {flops / 1e6:,.1f} MFLOP per token to train, at {config.train.sequence_length:,} tokens a sequence",
    f"batch     {tokens:,} tokens a step, {_length(config.train, tokens)}",
    f"memory    {gib(4 * count.total)} float32 parameters; {gib(_ADAMW_BYTES * count.total)} to train all with AdamW, "
    "activations not counted",
    f"cache     {count.cache_bytes_per_token:,} bytes a token and {count.cache_bytes_fixed:,} a sequence to decode",
  ]
