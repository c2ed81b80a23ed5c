"""The quick start: a hybrid of Mamba-2, feed-forward, attention and expert layers on the standard library's source.

Goal:     learn visibly in minutes on two CPU cores, with every kind of layer at work.
Command:  python -m ultrathink_jax.main --config=configs/nano.py --workdir=runs/nano
Size:     3.1M parameters, 2.4M active
Hardware: two CPU cores, four minutes
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="MFAE",
    vocab_size=4096,
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
  config.optimizer.update(learning_rate=3e-3, warmup_steps=20)
  config.train.update(steps=1000, batch_size=4, sequence_length=512)
  return config
