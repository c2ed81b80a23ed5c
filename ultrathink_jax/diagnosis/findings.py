"""What the facts of a diagnosis say: a verdict for each, and what to try where it is not as it should be."""

import math
import statistics
from typing import Any, NamedTuple

from ultrathink_jax.config import Config
from ultrathink_jax.train.fitting import what_to_try
from ultrathink_jax.train.preflight import gib

_MOST_WARMUP = 0.2  # share of a run
_MOST_EPOCHS = 4  # from which on repeated data teach less than new ones (arXiv:2305.16264)
_FIRST_LOSS = 0.05  # share of ln V by which the first loss may differ, or
_FIRST_LOSS_NATS = 0.3
_OUTLIER = 1e3  # root mean square of a gradient / the median of all
_VANISHING = 1e-6
_DEPTH = 100  # gradients of the first and the last repeat of a layer
_LEAST_LOGIT_STD, _MOST_LOGIT_MEAN = 0.1, 10.0
_MOST_UPDATE, _LEAST_UPDATE = 0.5, 1e-6  # of a matrix by a step at the peak learning rate, relative to its norm
_LEAST_ENTROPY, _MOST_DROPPED = 0.7, 0.2  # of routing at the start
_NAMED = 3  # leaves of a kind that a line names


class Finding(NamedTuple):
  """A verdict: what was looked at, what was found, and what to try where `is_ok` is false."""

  name: str
  is_ok: bool
  found: str
  advice: str = ""


def findings(config: Config, facts: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the verdicts on the facts of a diagnosis, those of the steps only where steps were made."""
  found = [_warmup(facts["steps"]), _memory(config, facts["memory"])]
  if facts["steps"]["epochs"]:
    found.append(_epochs(facts["steps"]))
  probe = facts["probe"]
  if probe:
    found += [_first_loss(config, probe), _gradients(probe["leaves"])]
    if not failure(facts):
      found += [_scale(probe["leaves"]), _depth(probe["leaves"]), _updates(config, probe)]
      found += [_experts(probe["experts"])] if probe["experts"] else []
    found += [_logits(probe["logits"]), _falls(probe["losses"]), _same(probe["is_deterministic"])]
  return [{**each._asdict(), "is_ok": bool(each.is_ok)} for each in found]


def failure(facts: dict[str, Any]) -> str | None:
  """Returns a line that names the gradients, or else the steps, that are not finite, None where all are."""
  probe = facts["probe"]
  if not probe:
    return None
  leaves = [leaf["name"] for leaf in probe["leaves"] if not leaf["is_finite"]]
  values = zip(probe["losses"], probe["grad_norms"], strict=True)
  steps = [f"step {number}" for number, both in enumerate(values, 1) if not all(map(math.isfinite, both))]
  if not leaves and not steps:
    return None
  where = f"gradients of {_names(leaves)} are" if leaves else f"{_names(steps)} {'are' if len(steps) > 1 else 'is'}"
  return (
    f"{where} not finite on synthetic tokens: try --config.model.dtype=float32, a lower optimizer.learning_rate or a "
    "lower optimizer.clip_norm"
  )


def _warmup(steps: dict[str, Any]) -> Finding:
  found = f"{steps['warmup_steps']:,} of {steps['steps']:,} steps ({steps['warmup_share']:.1%})"
  is_ok = 0 < steps["warmup_share"] <= _MOST_WARMUP
  advice = "optimizer.warmup_steps between 1 % and 5 % of train.steps"
  return Finding("warm-up", is_ok, found, advice)


def _memory(config: Config, memory: dict[str, int]) -> Finding:
  found = f"a step needs about {gib(memory['need_bytes'])} of {gib(memory['have_bytes'])} per device"
  is_ok = memory["need_bytes"] <= memory["have_bytes"]
  return Finding("memory", is_ok, found, "" if is_ok else what_to_try(config).removeprefix("try "))


def _epochs(steps: dict[str, Any]) -> Finding:
  found = f"{steps['epochs']:.2g} epochs of {steps['train_tokens']:,} tokens"
  return Finding("data", steps["epochs"] <= _MOST_EPOCHS, found, "more data, or fewer train.steps")


def _first_loss(config: Config, probe: dict[str, Any]) -> Finding:
  expected, loss = math.log(config.model.vocab_size), probe["losses"][0]
  is_ok = abs(loss - expected) <= max(_FIRST_LOSS * expected, _FIRST_LOSS_NATS)
  found = f"{loss:.3f}, and ln {config.model.vocab_size} = {expected:.3f}"
  return Finding("first loss", is_ok, found, "a smaller model.logits_multiplier or model.embedding_multiplier")


def _gradients(leaves: list[dict[str, Any]]) -> Finding:
  broken = [leaf["name"] for leaf in leaves if not leaf["is_finite"]]
  if broken:
    return Finding("gradient flow", False, f"not finite in {_names(broken)}", "--config.model.dtype=float32")
  dead = [leaf["name"] for leaf in leaves if leaf["norm"] == 0]
  if dead:
    return Finding("gradient flow", False, f"none reaches {_names(dead)}", "whether this part of the model is in use")
  return Finding("gradient flow", True, f"all {len(leaves)} parameter arrays have a finite gradient that is not 0")


def _scale(leaves: list[dict[str, Any]]) -> Finding:
  median = statistics.median(leaf["rms"] for leaf in leaves)
  large = [leaf["name"] for leaf in leaves if leaf["rms"] > _OUTLIER * median]
  small = [leaf["name"] for leaf in leaves if 0 < leaf["rms"] < _VANISHING * median]
  if large or small:
    parts = [f"far above the others: {_names(large)}"] * bool(large) + [f"far below: {_names(small)}"] * bool(small)
    return Finding("gradient scale", False, "; ".join(parts), "optimizer.rate_multipliers for these, or model.qk_norm")
  ratio = max(leaf["rms"] for leaf in leaves) / median
  return Finding("gradient scale", True, f"the largest is {ratio:,.1f} times the median")


def _depth(leaves: list[dict[str, Any]]) -> Finding:
  """Compares the first and the last repeat of each stacked parameter."""
  repeats: dict[str, list[float]] = {}
  for leaf in leaves:
    stem, is_repeat, _ = leaf["name"].partition("[")
    if is_repeat and leaf["rms"] > 0:
      repeats.setdefault(stem, []).append(leaf["rms"])
  ratios = {stem: rms[0] / rms[-1] for stem, rms in repeats.items() if len(rms) > 1}
  if not ratios:
    return Finding("gradient by depth", True, "no layer is repeated")
  worst = max(ratios, key=lambda stem: abs(math.log(ratios[stem])))
  factor = max(ratios[worst], 1 / ratios[worst])
  found = f"first and last repeat of a layer differ by a factor of {factor:.1f} at most, in {worst}"
  return Finding("gradient by depth", factor < _DEPTH, found, "a smaller model.residual_multiplier, as 0.5")


def _updates(config: Config, probe: dict[str, Any]) -> Finding:
  """Judges the first update of matrices, scaled to the peak learning rate."""
  scale = config.optimizer.learning_rate / probe["learning_rate"] if probe["learning_rate"] else 1.0
  ratios = {leaf["name"]: leaf["update_ratio"] * scale for leaf in probe["leaves"] if _is_matrix(leaf)}
  if not ratios:
    return Finding("update to weight", True, "no matrix was moved")
  median, largest = statistics.median(ratios.values()), max(ratios, key=ratios.__getitem__)
  found = f"{median:.1e} at the peak learning rate (median; {ratios[largest]:.1e} of {largest})"
  is_ok = median >= _LEAST_UPDATE and ratios[largest] <= _MOST_UPDATE
  direction = "lower" if ratios[largest] > _MOST_UPDATE else "higher"
  return Finding("update to weight", is_ok, found, f"a {direction} optimizer.learning_rate")


def _is_matrix(leaf: dict[str, Any]) -> bool:
  return "kernel" in leaf["name"] and leaf["weight_norm"] > 0 and math.isfinite(leaf["update_ratio"])


def _experts(experts: dict[str, Any]) -> Finding:
  found = (
    f"entropy {experts['moe/entropy']:.2f} of 1, largest share {experts['moe/max_expert']:.0%}, "
    f"{experts['moe/dead']} dead, {experts['moe/dropped']:.1%} dropped"
  )
  is_ok = experts["moe/entropy"] >= _LEAST_ENTROPY and experts["moe/dropped"] <= _MOST_DROPPED
  return Finding("experts at start", is_ok, found, "a higher model.capacity_factor or loss.load_balance_weight")


def _logits(logits: dict[str, dict[str, float]]) -> Finding:
  spell = lambda x: f"mean {x['mean']:.2f}, std {x['std']:.2f}, {x['min']:.1f} to {x['max']:.1f}"
  is_fine = lambda x: x["std"] >= _LEAST_LOGIT_STD and abs(x["mean"]) <= _MOST_LOGIT_MEAN
  found = f"{spell(logits['before'])}; after the steps {spell(logits['after'])}"
  is_ok = all(map(is_fine, logits.values()))
  return Finding("logits", is_ok, found, "model.logits_multiplier, or loss.z_weight=1e-4 where they are large")


def _falls(losses: list[float]) -> Finding:
  found = f"from {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps on one batch"
  return Finding("loss falls", losses[-1] < losses[0], found, "a lower optimizer.learning_rate, or a longer warm-up")


def _same(is_deterministic: bool) -> Finding:
  found = "the same bits again" if is_deterministic else "two runs of the same steps differ"
  return Finding("determinism", is_deterministic, found, "--config.train.deterministic=True")


def _names(names: list[str]) -> str:
  more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
  return f"{', '.join(names[:_NAMED])}{more}"
