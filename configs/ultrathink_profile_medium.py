"""ULTRATHINK profile medium: the published hyper-parameters, taken literally.

Goal:     the guide's YAML profile; its name is not its size. Every fourth block has 60 experts in four groups.
Command:  python -m ultrathink_jax.main --config=configs/ultrathink_profile_medium.py --workdir=runs/medium
Size:     19.7B parameters, 2.2B active
Hardware: a pod
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="(AFAFAFAE)x6",
    vocab_size=100352,
    embed_dim=2048,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=8192,
    rope={"theta": 500000.0},
    num_experts=60,
    experts_per_token=2,
    expert_dim=8192,
    capacity_factor=1.25,
    router="grouped",
    expert_groups="knowledge=32,skill=16,meta=8,safety=4",
  )
  config.loss.update(
    load_balance_weight=0.001, router_z_weight=0.0001, router_importance_weight=0.001, router_entropy_weight=0.01
  )
  config.optimizer.update(learning_rate=1e-4, warmup_steps=10_000)
  config.train.update(steps=500_000, batch_size=128, sequence_length=4096, accumulation_steps=16)
  return config
