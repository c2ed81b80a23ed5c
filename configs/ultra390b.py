"""Ultra-AI 390B.

Goal:     the published hyper-parameters; pattern and expert width are chosen so that the size is true to the name.
Command:  python -m ultrathink_jax.main --config=configs/ultra390b.py --workdir=runs/ultra390b
Meshes:   configs/presets.py, as --config=configs/ultra390b.py:v5p-512
Size:     398.5B parameters, 53.3B active
Hardware: a pod of 512 chips or more; 6.4 TB of train state
"""

from ml_collections import ConfigDict

from configs import base, presets


def get_config(preset: str | None = None) -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="(MMAFMMEMMAMMEMMAMME)x8",
    vocab_size=50000,
    embed_dim=8192,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=32768,
    num_experts=256,
    experts_per_token=2,
    expert_dim=2304,
    capacity_factor=1.25,
    mamba_state_dim=64,
    mamba_num_groups=8,
    mamba_norm_groups=8,
    mamba_chunk_tokens=128,
  )
  config.optimizer.update(learning_rate=5e-5, warmup_steps=2_000)
  config.train.update(steps=1_000_000, batch_size=512, sequence_length=8192)
  config.evaluate.every_steps = 1000
  config.checkpoint.every_steps = 1000
  return presets.lay_out(config, "ultra390b", preset)
