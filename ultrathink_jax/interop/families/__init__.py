"""The architectures of the transformers library that we read and write, the plainest first."""

from ultrathink_jax.interop.families.family import Family
from ultrathink_jax.interop.families.hybrid import BAMBA, GRANITE
from ultrathink_jax.interop.families.llama import LLAMA, MISTRAL
from ultrathink_jax.interop.families.mamba2 import MAMBA2
from ultrathink_jax.interop.families.mixtral import MIXTRAL, OLMOE
from ultrathink_jax.interop.families.nemotron import NEMOTRON_H
from ultrathink_jax.interop.families.qwen import QWEN2, QWEN3, QWEN3_MOE

FAMILIES: dict[str, Family] = {
  family.model_type: family
  for family in (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, OLMOE, MAMBA2, GRANITE, BAMBA, NEMOTRON_H)
}
