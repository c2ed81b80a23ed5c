"""ULTRATHINK profile large: the published hyper-parameters, taken literally.

Goal:     the guide's YAML profile; its name is not its size. Every fourth block has 120 experts in four groups.
Command:  python -m ultrathink_jax.main --config=configs/ultrathink_profile_large.py --workdir=runs/large
Size:     175.5B parameters, 9.2B active
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
    router="grouped",
    expert_groups="knowledge=64,skill=32,meta=16,safety=8",
  )
  config.loss.update(
    load_balance_weight=0.001, router_z_weight=0.0001, router_importance_weight=0.001, router_entropy_weight=0.01
  )
  config.optimizer.update(learning_rate=3e-5, warmup_steps=10_000)
  config.train.update(steps=1_000_000, batch_size=128, sequence_length=8192, accumulation_steps=4)
  return config
