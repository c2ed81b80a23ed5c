"""ULTRATHINK's own guided run: 5,000 samples, a decoder of attention and experts.

Goal:     the guide expects loss 10.99 at step 0, 9.20 at step 100, 8.50 at step 200 on C4.
Command:  python -m ultrathink_jax.main --config=configs/ultrathink_5k.py --workdir=runs/ultrathink_5k
Size:     181M parameters, 68M active; the experts are in one bank of four groups
Hardware: a CPU or any GPU
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="(AE)x6",
    vocab_size=50257,
    embed_dim=512,
    tie_embeddings=True,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    num_experts=8,
    experts_per_token=2,
    expert_dim=2048,
    router="grouped",
    expert_groups="knowledge=4,skill=2,meta=1,safety=1",
    dtype="float32",
  )
  config.loss.update(
    load_balance_weight=0.001, router_z_weight=0.0001, router_importance_weight=0.001, router_entropy_weight=0.01
  )
  config.optimizer.update(learning_rate=5e-5, warmup_steps=100, weight_decay=0.01)
  config.train.update(steps=5000, batch_size=16, sequence_length=256, accumulation_steps=16)
  return config
