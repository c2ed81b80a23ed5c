"""Ultra-AI 52B.

Goal:     the published hyper-parameters; pattern and expert width are chosen so that the size is true to the name.
Command:  python -m ultrathink_jax.main --config=configs/ultra52b.py --workdir=runs/ultra52b
Meshes:   configs/presets.py, as --config=configs/ultra52b.py:v5p-64
Size:     52.0B parameters, 21.1B active
Hardware: 64 GPUs of 80 GB with mesh.fsdp=64
"""

from ml_collections import ConfigDict

from configs import base, presets


def get_config(preset: str | None = None) -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="(MMAFMMMMAMME)x8",
    vocab_size=50000,
    embed_dim=6144,
    num_heads=48,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=24576,
    num_experts=128,
    experts_per_token=2,
    expert_dim=1664,
    capacity_factor=1.25,
    mamba_state_dim=64,
    mamba_num_groups=8,
    mamba_norm_groups=8,
    mamba_chunk_tokens=128,
  )
  config.optimizer.update(learning_rate=1e-4, warmup_steps=2_000)
  config.train.update(steps=500_000, batch_size=128, sequence_length=8192)
  config.evaluate.every_steps = 1000
  config.checkpoint.every_steps = 1000
  return presets.lay_out(config, "ultra52b", preset)
