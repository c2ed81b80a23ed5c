"""Writes an adapter directory that PEFT and the loaders of its files compute exactly, or refuses and says why.

PEFT loads some files without an error and without their effect; what those have in common is refused here. Letters as
in reading.py.
"""

import collections
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.interop.families import Family
from ultrathink_jax.interop.families.family import BANK, to_theirs
from ultrathink_jax.interop.families.pattern import letters_of
from ultrathink_jax.interop.peft.adapter import CONFIG_FILE, WEIGHTS_FILE, PeftAdapter, alpha_of, require_held, scale_of
from ultrathink_jax.interop.peft.modules import (
  HEAD,
  PREFIX,
  Site,
  is_bypassed,
  matrix_dims,
  sites,
  tensors_in_memory,
)
from ultrathink_jax.interop.peft.packing import join, pack_bank
from ultrathink_jax.interop.peft.settings import PEFT_VERSION, patterns, shorten
from ultrathink_jax.interop.pretrained import named_shapes
from ultrathink_jax.lora.named import NamedAdapter

ExpertLayout = Literal["per_expert", "fused"]
_FUSED = "write it with --expert_layout=fused"


class Placed(NamedTuple):
  """An adapter and the tensor there that it stands beside."""

  site: Site
  adapter: NamedAdapter


def write_adapter(
  directory: Path,
  model: ModelConfig,
  family: Family,
  adapter: PeftAdapter,
  expert_layout: ExpertLayout = "per_expert",
) -> None:
  """Writes adapter_config.json and adapter_model.safetensors.

  `expert_layout` "per_expert" has a module for every expert, as other loaders want it and as PEFT converts it; "fused"
  is as PEFT holds experts itself.

  Raises:
    ConfigError: PEFT would not compute it, or not exactly; or the architecture does not hold the model.
  """
  require_held(model, family)
  if not adapter.adapters:
    raise ConfigError("there is no LoRA, and PEFT loads no adapter without one; export the whole model")
  shapes = named_shapes(model)
  letters = letters_of(model)
  everything = sites(family, letters, shapes, expert_layout == "per_expert")
  _require_sites(family, everything, adapter.adapters)
  if adapter.is_rslora and any(site.entry.expert is not None and _adapted(site, adapter) for site in everything):
    adapter = adapter._replace(adapters=_without_rslora(adapter.adapters), is_rslora=False)
  placed = _place(everything, adapter, shapes)
  _require_computed(family, placed)
  tensors = {}
  for one in placed:
    tensors |= _tensors(one, placed)
  saved, whole = _trained(family, letters, shapes, adapter.trained, placed)
  values = _config(adapter, everything, placed)
  if model.tie_embeddings and "embedding.table" in adapter.trained:  # each is a copy of its own there
    saved = [*saved, HEAD]
    whole[f"{PREFIX}{HEAD}.weight"] = np.array(adapter.trained["embedding.table"])
    values["ensure_weight_tying"] = True
  values["modules_to_save"] = saved or None
  directory.mkdir(parents=True, exist_ok=True)
  save_file(tensors | whole, directory / WEIGHTS_FILE, {"format": "pt"})
  (directory / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n")


def _adapted(site: Site, adapter: PeftAdapter) -> bool:
  return not adapter.adapters.keys().isdisjoint(site.entry.parts)


def _require_sites(family: Family, everything: list[Site], adapters: dict[str, NamedAdapter]) -> None:
  lost = sorted(adapters.keys() - {part for site in everything for part in site.entry.parts})
  if not lost:
    return
  if any(adapters[name].a.ndim == 3 for name in lost):
    raise ConfigError(f"{lost[0]}: PEFT knows no module for every expert of {family.architecture}; {_FUSED}")
  raise ConfigError(f"{lost[0]}: {family.architecture} has no such matrix to adapt; merge the adapter and export that")


def _without_rslora(adapters: dict[str, NamedAdapter]) -> dict[str, NamedAdapter]:
  """Returns the same updates with scales alpha / r: PEFT joins gate and up of experts apart to twice the rank and twice
  the alpha, which is the same scale in this form only."""
  plain = lambda one: one._replace(alpha=alpha_of(scale_of(one.alpha, one.rank, True), one.rank, False))
  return {name: plain(one) for name, one in adapters.items()}


def _place(everything: list[Site], adapter: PeftAdapter, shapes: dict[str, Any]) -> list[Placed]:
  placed = []
  for site in everything:
    if not _adapted(site, adapter):
      continue
    parts: dict[str, NamedAdapter | None] = {name: adapter.adapters.get(name) for name in site.entry.parts}
    if site.entry.expert is not None:
      (name,) = parts
      bank = parts[name]
      parts[name] = NamedAdapter(bank.a[site.entry.expert], bank.b[site.entry.expert], bank.alpha, bank.magnitude)
    in_dim, out_dims = matrix_dims(site.entry, shapes)
    whole = join(parts, out_dims, adapter.is_rslora)
    if (whole.a.shape[-2], whole.b.shape[-1]) != (in_dim, sum(out_dims)):
      raise ConfigError(
        f"{site.target}: the adapter maps {whole.a.shape[-2]} to {whole.b.shape[-1]}, and the model {in_dim} to "
        f"{sum(out_dims)}; it is of another model"
      )
    placed.append(Placed(site, whole))
  return placed


def _require_computed(family: Family, placed: list[Placed]) -> None:
  """Raises ConfigError for what PEFT refuses, or loads and does not compute."""
  dora = [one.adapter.magnitude is not None for one in placed]
  for one, has_magnitude in zip(placed, dora, strict=True):
    if is_bypassed(family, one.site):
      raise ConfigError(
        f"{one.site.target}: PEFT adapts no out_proj of {family.architecture}; merge the adapter and export that"
      )
    if has_magnitude and _is_parameter(one.site):
      raise ConfigError(
        f"{one.site.target}: PEFT has no DoRA of experts and routers, whose parameters it wraps; train them with LoRA"
      )
    if has_magnitude != dora[0]:
      raise ConfigError(f"{one.site.target}: PEFT has DoRA for all adapters or none; train all alike")
  _require_whole_experts(placed)


def _require_whole_experts(placed: list[Placed]) -> None:
  """Raises ConfigError where PEFT would convert adapters of experts apart wrongly.

  It joins gate and up, to the rank and alpha of the file, and drops them where down has no adapter; it warns at most.
  """
  layers: dict[str, set[str]] = {}
  sizes = set()
  for site, adapter in placed:
    if site.entry.expert is not None:
      layer, _, kernel = site.entry.parts[0].removesuffix(".kernel").rpartition(".")
      layers.setdefault(layer, set()).add(kernel)
      if kernel in ("gate", "up"):
        sizes.add((adapter.rank, adapter.alpha))
  for layer, kernels in layers.items():
    if kernels not in ({"down"}, {"gate", "up", "down"}):
      raise ConfigError(
        f"{layer}: only {', '.join(sorted(kernels))} of gate, up and down are adapted, which PEFT loads for experts "
        f"apart without their effect; {_FUSED}"
      )
  if len(sizes) > 1:
    raise ConfigError(
      f"gate and up of experts have (rank, alpha) {sorted(sizes)}, and PEFT takes one for experts apart; {_FUSED}"
    )


def _is_parameter(site: Site) -> bool:
  """Returns whether PEFT wraps a parameter, at once or once it has converted the file."""
  return site.parameter is not None or len(site.aliases) > 1


def _tensors(one: Placed, placed: list[Placed]) -> dict[str, np.ndarray]:
  """Returns the tensors of an adapter by their names in the file."""
  site, adapter = one
  if site.entry.transform == BANK:
    lora_a, lora_b = pack_bank(adapter.a, adapter.b)
  else:
    lora_a, lora_b = adapter.a.T, adapter.b.T
  outside = [other.site for other in placed if other.site.module == site.module]
  depth = len(outside) - 1 - outside.index(site)
  path = PREFIX + site.module + ".base_layer" * depth
  tensors = {f"{path}.lora_A.weight": lora_a, f"{path}.lora_B.weight": lora_b}
  if adapter.magnitude is not None:
    tensors[f"{path}.lora_magnitude_vector"] = adapter.magnitude
  return {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}


def _trained(
  family: Family, letters: str, shapes: dict[str, Any], trained: dict[str, np.ndarray], placed: list[Placed]
) -> tuple[list[str], dict[str, np.ndarray]]:
  """Returns modules_to_save and the tensors of parameters trained in full: PEFT saves whole modules.

  Of a module that is adapted too, the weight is that of its base_layer, and it is none of modules_to_save.
  """
  entries = tensors_in_memory(family, letters, shapes)
  chosen = {name: entry for name, entry in entries.items() if not trained.keys().isdisjoint(entry.parts)}
  if lost := sorted(trained.keys() - {part for entry in chosen.values() for part in entry.parts}):
    raise ConfigError(f"{lost[0]}: {family.architecture} has no such parameter; export the whole model")
  adapted = {part for one in placed for part in one.site.entry.parts}
  modules = {one.site.module for one in placed if not _is_parameter(one.site)}
  saved, kept = set(), {}
  for name, entry in chosen.items():
    module, _, parameter = name.rpartition(".")
    if module in modules:
      kept[f"{PREFIX}{module}.base_layer.{parameter}"] = entry
    elif not adapted.isdisjoint(entry.parts):
      raise ConfigError(f"{name} is adapted and trained in full, which PEFT has not for parameters; do one of them")
    else:
      saved.add(module)
      kept[f"{PREFIX}{name}"] = entry
  for name, entry in entries.items():
    missing = [part for part in entry.parts if part not in trained]
    inside = [module for module in saved if name.startswith(f"{module}.")]
    if missing and (inside or name in chosen):
      raise ConfigError(
        f"{name}: {missing[0]} is not trained in full and others of its module are; PEFT saves whole modules, so "
        "train all of it or export the whole model"
      )
  everything = {name.rpartition(".")[0] for name in entries}
  return shorten(saved, everything), {name: to_theirs(entry, trained) for name, entry in kept.items()}


def _config(adapter: PeftAdapter, everything: list[Site], placed: list[Placed]) -> dict[str, Any]:
  """Returns adapter_config.json but for the modules trained in full."""
  # PEFT joins gate and up of experts apart by the rank and alpha of the file, whatever the patterns say.
  is_joined = lambda site: site.entry.expert is not None and not site.entry.parts[0].endswith(".down.kernel")
  decisive = [one for one in placed if is_joined(one.site)] or placed
  sizes = collections.Counter((one.adapter.rank, one.adapter.alpha) for one in decisive)
  rank, alpha = sizes.most_common(1)[0][0]
  ranks = {alias: one.adapter.rank for one in placed for alias in one.site.aliases}
  alphas = {alias: _number(one.adapter.alpha) for one in placed for alias in one.site.aliases}
  target_modules, target_parameters = (
    shorten(
      [one.site.target for one in placed if (one.site.parameter is not None) == is_parameter],
      [site.target for site in everything],
    )
    for is_parameter in (False, True)
  )
  has_parameters = any(_is_parameter(one.site) for one in placed)
  return {
    "peft_type": "LORA",
    "peft_version": PEFT_VERSION,
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": adapter.base,
    "r": rank,
    "lora_alpha": _number(alpha),
    "rank_pattern": patterns(ranks, rank),
    "alpha_pattern": patterns(alphas, _number(alpha)),
    "lora_dropout": 0.0 if has_parameters else adapter.dropout,  # PEFT has none for parameters
    "target_modules": target_modules,
    "target_parameters": target_parameters or None,
    "use_rslora": adapter.is_rslora,
    "use_dora": any(one.adapter.magnitude is not None for one in placed),
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
  }


def _number(value: float) -> float | int:
  return int(value) if value == int(value) else value
