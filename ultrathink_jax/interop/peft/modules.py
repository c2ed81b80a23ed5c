"""Which modules of PEFT's hold which of our matrices, from the rows of each architecture.

Where experts are one tensor, or a router is no nn.Linear, PEFT wraps the parameter (target_parameters); several
parameters of one module are wrapped one around the other, the first declared innermost, and every wrapper but the
outermost adds `.base_layer` to the path.
"""

import re
from typing import Any, NamedTuple

from ultrathink_jax.interop.families import Family
from ultrathink_jax.interop.families.family import BANK, LINEAR, LINEAR_FROM_HEADS, Entry, their_shape

PREFIX = "base_model.model."
HEAD = "lm_head"
# From the names of tensors in files to those in memory, which PEFT knows, where these differ.
_IN_MEMORY = {
  "mixtral": ((r"\.block_sparse_moe\.", ".mlp."),),
  "nemotron_h": ((r"^backbone\.", "model."),),
  "granitemoehybrid": (
    (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
    (r"\.block_sparse_moe\.router\.layer\.weight$", ".block_sparse_moe.router.weight"),
  ),
}
# What PEFT takes for modules of transformers 4, a module for every expert, and converts when it loads an adapter: by
# the last part of the path alone, so a dense layer's gate_proj is lost unless its parameter is targeted.
_CONVERTED = {
  "mixtral": ("gate", "w1", "w2", "w3"),
  "qwen3_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
  "olmoe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
# PEFT refuses adapters there: a fused kernel reads the weight behind the module's back.
_BYPASSED = {"mamba2": ("out_proj",), "nemotron_h": ("out_proj",)}


class Site(NamedTuple):
  """A tensor that an adapter can stand beside.

  Attributes:
    module: path of its module.
    parameter: its name there, where PEFT wraps the parameter and not the module.
    aliases: under which PEFT looks for its rank and alpha, as files of transformers 4 and as memory of 5 spell it.
    entry: our parameters in it.
  """

  module: str
  parameter: str | None
  aliases: tuple[str, ...]
  entry: Entry

  @property
  def target(self) -> str:
    return f"{self.module}.{self.parameter}" if self.parameter else self.module


def sites(family: Family, letters: str, shapes: dict[str, Any], is_per_expert: bool) -> list[Site]:
  """Returns every tensor that can be adapted, in the order of the files.

  `is_per_expert`: a module for every expert, as PEFT converts it; where it does not, experts are missing.
  """
  in_memory = {entry.parts: name for name, entry in tensors_in_memory(family, letters, shapes).items()}
  is_old = is_per_expert and has_per_expert(family)
  found = []
  for name, entry in family.entries(letters, shapes, is_fused=not is_old).items():
    is_bank = entry.transform == BANK
    if not is_matrix(entry) or (is_bank and is_per_expert):
      continue
    spelled = in_memory.get(entry.parts, name)
    is_module_once = is_old and (entry.expert is not None or _is_router(entry))
    module, _, parameter = (name if is_module_once else spelled).rpartition(".")
    is_taken = module.rpartition(".")[2] in _CONVERTED.get(family.model_type, ()) and entry.expert is None
    if (is_bank or _is_router(entry) or is_taken) and not is_module_once:
      found.append(Site(module, parameter, (spelled,), entry))
    else:
      found.append(Site(module, None, (module, *([spelled] if is_module_once else [])), entry))
  return found


def tensors_in_memory(family: Family, letters: str, shapes: dict[str, Any]) -> dict[str, Entry]:
  """Returns every tensor by its name in memory."""
  return {_in_memory(family, name): entry for name, entry in family.entries(letters, shapes, is_fused=True).items()}


def has_per_expert(family: Family) -> bool:
  """Returns whether PEFT converts adapters of this architecture that have a module for every expert."""
  return family.model_type in _CONVERTED


def is_bypassed(family: Family, site: Site) -> bool:
  return site.module.rpartition(".")[2] in _BYPASSED.get(family.model_type, ())


def is_matrix(entry: Entry) -> bool:
  return entry.transform in (LINEAR, LINEAR_FROM_HEADS, BANK) or entry.parts == ("unembedding.kernel",)


def is_of_experts(entry: Entry) -> bool:
  return entry.expert is not None or entry.transform == BANK


def _is_router(entry: Entry) -> bool:
  return entry.parts[0].endswith(".router.kernel")


def matrix_dims(entry: Entry, shapes: dict[str, Any]) -> tuple[int, list[int]]:
  """Returns the input dim of a tensor and the output dim of each of its parts."""
  each = [their_shape(entry._replace(parts=(part,)), shapes) for part in entry.parts]
  return each[0][-1], [shape[-2] for shape in each]


def _in_memory(family: Family, name: str) -> str:
  return _replace_all(_IN_MEMORY.get(family.model_type, ()), name)


def _in_files(family: Family, name: str) -> str:
  return _replace_all(family.renames, name)


def _replace_all(renames: tuple[tuple[str, str], ...], name: str) -> str:
  for pattern, replacement in renames:
    name = re.sub(pattern, replacement, name)
  return name


class Modules(NamedTuple):
  """What paths in an adapter's file mean.

  Attributes:
    tensors: of both forms of files, by their names there.
    banks: {module in memory: {parameter: entry}}, in the order in which PEFT wraps them.
  """

  family: Family
  tensors: dict[str, Entry]
  banks: dict[str, dict[str, Entry]]

  def tensor(self, name: str) -> Entry | None:
    """Returns what a tensor of the model holds, however it is spelled."""
    return self.tensors.get(_in_files(self.family, name))

  def wrapped(self, module: str) -> dict[str, Entry]:
    """Returns the banks in a module, however it is spelled."""
    return self.banks.get(_in_memory(self.family, _in_files(self.family, module + ".")).removesuffix("."), {})


def read_modules(family: Family, letters: str, shapes: dict[str, Any]) -> Modules:
  """Returns what the paths of a model's modules mean."""
  banks: dict[str, dict[str, Entry]] = {}
  for name, entry in tensors_in_memory(family, letters, shapes).items():
    if entry.transform == BANK:
      module, _, parameter = name.rpartition(".")
      banks.setdefault(module, {})[parameter] = entry
  forms = [family.entries(letters, shapes, is_fused) for is_fused in (False, True)]
  return Modules(family, forms[0] | forms[1], banks)
