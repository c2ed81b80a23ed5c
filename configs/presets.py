"""How each model size is laid over devices: --config=configs/ultra13b.py:v5p-64 runs it on 64 chips of that kind.

The TPU compiler writes a gather over all chips of a slice as a sum, which moves twice the bytes: no fsdp axis is all.
A preset sets the mesh, what is recomputed and the micro-batches; everything else stays the config's. Whether it fits,
and how fast it would be: --mode=plan --topology=v5p:4x4x4.
"""

from ml_collections import ConfigDict

# model -> devices -> (mesh axes of more than one device, remat, accumulation_steps)
PRESETS: dict[str, dict[str, tuple[dict[str, int], str, int]]] = {
  "ultra3b": {
    "v5e-64": ({"data": 2, "fsdp": 32}, "full", 1),
    "v5p-8": ({"data": 2, "fsdp": 4}, "full", 4),
    "v5p-64": ({"data": 4, "fsdp": 16}, "full", 1),
    "v6e-64": ({"data": 2, "fsdp": 32}, "full", 1),
    "h100-8": ({"fsdp": 8}, "full", 8),
    "h200-8": ({"fsdp": 8}, "full", 4),
  },
  "ultra13b": {
    "v5e-256": ({"fsdp": 32, "expert": 4, "tensor": 2}, "full", 1),
    "v5p-64": ({"fsdp": 16, "expert": 4}, "full", 2),
    "v6e-128": ({"fsdp": 32, "expert": 4}, "full", 1),
    "h100-64": ({"fsdp": 8, "expert": 8}, "full", 2),
    "h200-32": ({"fsdp": 4, "expert": 8}, "full", 4),
  },
  "ultra52b": {
    "v5p-64": ({"fsdp": 16, "expert": 4}, "full", 2),
    "v6e-256": ({"fsdp": 32, "expert": 4, "tensor": 2}, "full", 1),
    "h100-128": ({"fsdp": 16, "expert": 8}, "full", 1),
    "h200-64": ({"fsdp": 8, "expert": 8}, "full", 2),
  },
  "ultra390b": {
    "v5p-512": ({"fsdp": 64, "expert": 8}, "full", 1),
    "h200-512": ({"fsdp": 64, "expert": 8}, "full", 1),
  },
}


def lay_out(config: ConfigDict, model: str, preset: str | None) -> ConfigDict:
  """Returns `config` with a preset of the model's, or as it is without one. Raises ValueError for an unknown one."""
  if not preset:
    return config
  if preset not in PRESETS[model]:
    raise ValueError(f"{model}:{preset} is not a preset; choose one of {', '.join(PRESETS[model])}")
  axes, remat, accumulation_steps = PRESETS[model][preset]
  config.mesh.update({"data": 1} | axes)
  config.model.remat = remat
  config.train.accumulation_steps = accumulation_steps
  return config
