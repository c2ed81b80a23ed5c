"""Mixtral 8x7B: attention and experts, by its published shape.

Goal:     the architecture to fine-tune. Source: arXiv:2401.04088.
Command:  python -m ultrathink_jax.main --config=configs/mixtral_8x7b.py --workdir=runs/mixtral_8x7b
Size:     46.7B parameters, 12.9B active
Hardware: 16 GPUs of 80 GB with mesh.fsdp=16
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="(AE)x32",
    vocab_size=32000,
    embed_dim=4096,
    norm_epsilon=1e-05,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope={"theta": 1000000.0},
    num_experts=8,
    experts_per_token=2,
    expert_dim=14336,
  )
  config.optimizer.update(learning_rate=1e-4, warmup_steps=2_000)
  config.train.update(steps=100_000, batch_size=64, sequence_length=4096)
  config.evaluate.every_steps = 1000
  config.checkpoint.every_steps = 1000
  return config
