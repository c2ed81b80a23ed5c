"""Ultra-AI 3B: 28 Mamba-2, 4 attention, 4 feed-forward and 4 expert layers.

Goal:     the published hyper-parameters; pattern and expert width are chosen so that the size is true to the name.
Command:  python -m ultrathink_jax.main --config=configs/ultra3b.py --workdir=runs/ultra3b
Meshes:   configs/presets.py, as --config=configs/ultra3b.py:h100-8
Size:     3.04B parameters, 1.28B active
Hardware: 8 GPUs of 80 GB with mesh.fsdp=8; one of 141 GB with train.accumulation_steps=64
"""

from ml_collections import ConfigDict

from configs import base, presets


def get_config(preset: str | None = None) -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="(MMMMAFMMME)x4",
    vocab_size=50000,
    embed_dim=2048,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=8192,
    num_experts=64,
    experts_per_token=2,
    expert_dim=1152,
    capacity_factor=1.25,
    mamba_state_dim=64,
    mamba_num_groups=8,
    mamba_norm_groups=8,
    mamba_chunk_tokens=128,
  )
  config.optimizer.update(learning_rate=2e-4, warmup_steps=2_000)
  config.train.update(steps=100_000, batch_size=64, sequence_length=8192, accumulation_steps=8)
  config.evaluate.every_steps = 1000
  config.checkpoint.every_steps = 1000
  return presets.lay_out(config, "ultra3b", preset)
