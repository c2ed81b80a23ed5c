"""What of a model a run trains, counted and by name."""

import math
from collections import Counter
from typing import Any

import jax

from ultrathink_jax.config import Config
from ultrathink_jax.lora.adapting import adaptation_of
from ultrathink_jax.lora.targets import Target
from ultrathink_jax.models.counts import ModelCount, train_flops_per_token
from ultrathink_jax.models.language_model import parameter_shapes


def count_trained(config: Config) -> tuple[int, int]:
  """Returns how many parameters an adapted run trains and how many there are, adapters included."""
  adaptation, shapes = adaptation_of(config), parameter_shapes(config.model)
  whole, _ = jax.eval_shape(adaptation.split, shapes, jax.random.key(0))
  adapters = sum(count_of(target) for target in adaptation.targets)
  if config.lora.variant == "dora":
    adapters += sum(len(target.names) * target.out_dim for target in adaptation.targets)
  return adapters + _size(whole.get("trained", {})), _size(shapes) + adapters


def flops_per_token(config: Config, count: ModelCount) -> float:
  """Returns FLOPs to train on one token: of frozen matrices those of their own gradients are not spent."""
  share = 1.0
  if config.is_adapted:
    trained, total = count_trained(config)
    share = trained / total
  return train_flops_per_token(config.model, count, config.train.sequence_length, share)


def count_of(target: Target) -> int:
  """Returns the parameters of A and B of a target's layers, each of its own rank."""
  return max(1, target.experts) * sum(target.ranks) * (target.in_dim + target.out_dim)


def describe(config: Config) -> list[str]:
  """Returns lines for people: what is trained, in PEFT's words, and what has adapters."""
  trained, total = count_trained(config)
  lines = [f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"]
  adaptation = adaptation_of(config)
  kinds: Counter[tuple[str, int, float]] = Counter()
  for target in adaptation.targets:
    for name, rank, alpha in zip(target.names, target.ranks, target.alphas, strict=True):
      kinds[".".join(name.split(".")[2:]) + (f" x{target.experts}" if target.experts else ""), rank, alpha] += 1
  alike: dict[tuple[int, float, int], list[str]] = {}
  for (kind, rank, alpha), count in kinds.items():
    alike.setdefault((rank, alpha, count), []).append(kind)
  lines += [
    f"rank {rank}, alpha {alpha:g}{_variant(config)}: {', '.join(of)} of {count} layer{'s' * (count > 1)}"
    for (rank, alpha, count), of in alike.items()
  ]
  if adaptation.trained:
    parts = [" ".join(["/".join(each.path), *_part(each)]) for each in adaptation.trained]
    more = f" and {len(parts) - 6} more" if len(parts) > 6 else ""
    lines.append(f"in full: {', '.join(parts[:6])}{more}")
  if config.lora.base_dtype != "float32":
    lines.append(f"frozen matrices are kept as {config.lora.base_dtype}")
  return lines


def _variant(config: Config) -> str:
  lora = config.lora
  words = [lora.variant if lora.variant != "lora" else "", lora.scaling if lora.scaling != "standard" else ""]
  words += [lora.init if lora.init != "kaiming" else "", f"dropout {lora.dropout:g}" if lora.dropout else ""]
  return "".join(f", {word}" for word in words if word)


def _part(each: Any) -> list[str]:
  words = [] if each.repeats is None else [f"(layers {', '.join(map(str, each.repeats))} of the stack)"]
  return words + ([] if each.experts is None else [f"(experts {', '.join(map(str, each.experts))})"])


def _size(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
