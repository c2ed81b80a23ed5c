"""Ultra-AI 13B.

Goal:     our hyper-parameters for the published name: 40 blocks in four periods.
Command:  python -m ultrathink_jax.main --config=configs/ultra13b.py --workdir=runs/ultra13b
Meshes:   configs/presets.py, as --config=configs/ultra13b.py:v5p-64
Size:     13.2B parameters, 3.2B active
Hardware: 16 GPUs of 80 GB with mesh.fsdp=16
"""

from ml_collections import ConfigDict

from configs import base, presets


def get_config(preset: str | None = None) -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="(MMAFMMEMMAMME)x4",
    vocab_size=50000,
    embed_dim=3072,
    num_heads=24,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=12288,
    num_experts=64,
    experts_per_token=2,
    expert_dim=2176,
    capacity_factor=1.25,
    mamba_state_dim=64,
    mamba_num_groups=8,
    mamba_norm_groups=8,
    mamba_chunk_tokens=128,
  )
  config.optimizer.update(learning_rate=1.5e-4, warmup_steps=2_000)
  config.train.update(steps=250_000, batch_size=128, sequence_length=8192)
  config.evaluate.every_steps = 1000
  config.checkpoint.every_steps = 1000
  return presets.lay_out(config, "ultra13b", preset)
