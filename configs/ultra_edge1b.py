"""Ultra-AI edge, 1B: a tied hybrid small enough for one accelerator.

Goal:     our sizes for the published name: 24 blocks, one period.
Command:  python -m ultrathink_jax.main --config=configs/ultra_edge1b.py --workdir=runs/ultra_edge1b
Size:     1.02B parameters, 0.27B active
Hardware: one GPU or TPU chip of 40 GB or more
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="MMMMAFMEMMMMMMEAMMMMMEMMAMME",
    vocab_size=50000,
    embed_dim=1024,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    mlp_dim=4096,
    num_experts=32,
    experts_per_token=2,
    expert_dim=2048,
    capacity_factor=1.25,
    mamba_state_dim=64,
    mamba_num_groups=4,
    mamba_norm_groups=4,
    mamba_chunk_tokens=128,
    tie_embeddings=True,
  )
  config.optimizer.update(learning_rate=3e-4, warmup_steps=2_000)
  config.train.update(steps=100_000, batch_size=64, sequence_length=4096, accumulation_steps=8)
  config.evaluate.every_steps = 1000
  config.checkpoint.every_steps = 1000
  return config
