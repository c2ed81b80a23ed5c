"""Mixtral 8x22B: attention and experts, by its published shape.

Goal:     the architecture to fine-tune. Source: arXiv:2401.04088.
Command:  python -m ultrathink_jax.main --config=configs/mixtral_8x22b.py --workdir=runs/mixtral_8x22b
Size:     140.6B parameters, 39.1B active
Hardware: 64 GPUs of 80 GB with mesh.fsdp=64
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="(AE)x56",
    vocab_size=32768,
    embed_dim=6144,
    norm_epsilon=1e-05,
    num_heads=48,
    num_kv_heads=8,
    head_dim=128,
    rope={"theta": 1000000.0},
    num_experts=8,
    experts_per_token=2,
    expert_dim=16384,
  )
  config.optimizer.update(learning_rate=1e-4, warmup_steps=2_000)
  config.train.update(steps=100_000, batch_size=64, sequence_length=4096)
  config.evaluate.every_steps = 1000
  config.checkpoint.every_steps = 1000
  return config
