"""The quick start: a hybrid of Mamba-2, attention, feed-forward and expert layers on the standard library's source.

Goal:     learn visibly in minutes on two CPU cores, with every kind of layer at work.
Command:  python -m ultrathink_jax.main --config=configs/nano.py --workdir=runs/nano
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="MFAE MFAE",
    vocab_size=2048,
    embed_dim=192,
    dtype="float32",
    remat="none",
    num_heads=3,
    num_kv_heads=1,
    mlp_dim=512,
    num_experts=8,
    expert_dim=192,
    mamba_state_dim=32,
    mamba_chunk_tokens=64,
  )
  config.optimizer.update(learning_rate=3e-3, warmup_steps=30)
  config.train.update(steps=300, batch_size=16, sequence_length=512)
  return config
