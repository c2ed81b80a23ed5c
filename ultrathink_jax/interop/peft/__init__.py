"""Adapter directories of the PEFT library: adapter_config.json and adapter_model.safetensors, read and written."""

from ultrathink_jax.interop.peft.adapter import PeftAdapter
from ultrathink_jax.interop.peft.reading import read_adapter
from ultrathink_jax.interop.peft.writing import write_adapter

__all__ = ["PeftAdapter", "read_adapter", "write_adapter"]
