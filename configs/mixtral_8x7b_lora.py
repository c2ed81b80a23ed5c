"""Mixtral 8x7B adapted to a code base by low-rank adapters of its attention; experts and routers are frozen.

Goal:     the fine-tuning guide's balanced preset; others by name: --config=configs/mixtral_8x7b_lora.py:aggressive
Command:  python -m ultrathink_jax.main --mode=import --source=Mixtral-8x7B-v0.1 --workdir=runs/mixtral_8x7b
          python -m ultrathink_jax.main --config=configs/mixtral_8x7b_lora.py --workdir=runs/mixtral_8x7b_lora
            --config.data.source=code:PATH
Size:     13,631,488 of 46.7B parameters are trained
Hardware: 4 H200; --mode=plan --topology=h200:4 says what it needs there
"""

from ml_collections import ConfigDict

from configs import mixtral_8x7b

# name -> keys that differ from the balanced one, by section
PRESETS: dict[str, dict[str, dict]] = {
  "balanced": {},
  "conservative": {"lora": {"rank": 8, "alpha": 16.0}, "optimizer": {"learning_rate": 1e-4}},
  "aggressive": {"lora": {"rank": 32, "alpha": 64.0}, "optimizer": {"learning_rate": 3e-4}},
  "maximum_quality": {
    "lora": {"rank": 32, "alpha": 64.0},
    "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.1},
    "train": {"epochs": 5.0},
  },
  "quick_test": {"train": {"epochs": 0.0, "steps": 100}},
  "memory_constrained": {"train": {"sequence_length": 2048, "accumulation_steps": 32, "batch_size": 128}},
}


def get_config(preset: str = "balanced") -> ConfigDict:
  return adapt(mixtral_8x7b.get_config(), "runs/mixtral_8x7b", preset)


def adapt(config: ConfigDict, base: str, preset: str) -> ConfigDict:
  """Returns the guide's settings for a Mixtral. Raises ValueError for an unknown preset."""
  if preset not in PRESETS:
    raise ValueError(f"{preset!r} is not a preset; choose one of {', '.join(PRESETS)}")
  config.checkpoint.update(init_from=base, every_steps=100, keep_last=3, keep_best=1)
  config.model.remat = "full"
  config.lora.update(rank=16, alpha=32.0, dropout=0.05, targets=("attention",), base_dtype="bfloat16")
  config.optimizer.update(
    learning_rate=2e-4, final_learning_rate_ratio=0.005, warmup_ratio=0.03, weight_decay=0.01, beta2=0.999
  )
  # Neither routers nor experts move: a loss of balance could only pull at attention.
  config.loss.update(load_balance_weight=0.0, router_z_weight=0.0)
  config.mesh.update(data=1, fsdp=4)
  config.train.update(epochs=3.0, batch_size=64, accumulation_steps=16, sequence_length=4096)
  config.evaluate.update(every_steps=100, patience=3, min_delta=0.001)
  for section, keys in PRESETS[preset].items():
    config[section].update(keys)
  return config
