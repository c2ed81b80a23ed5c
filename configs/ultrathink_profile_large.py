"""ULTRATHINK profile large: the published hyper-parameters, taken literally.

Goal:     the guide's YAML profile; its name is not its size. Every fourth block has 120 experts in one bank.
Command:  python -m ultrathink_jax.main --config=configs/ultrathink_profile_large.py --workdir=runs/large
Size:     see mode describe
Hardware: a pod
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="(AFAFAFAE)x8",
    vocab_size=100352,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14336,
    rope={"theta": 500000.0},
    num_experts=120,
    experts_per_token=2,
    expert_dim=14336,
    capacity_factor=1.25,
  )
  config.optimizer.update(learning_rate=3e-5, warmup_steps=10_000)
  config.train.update(steps=1_000_000, batch_size=128, sequence_length=8192, accumulation_steps=4)
  return config
