"""ULTRATHINK medium: a dense decoder with tied embeddings.

Goal:     the named size, with the feed-forward width that makes the name true.
Command:  python -m ultrathink_jax.main --config=configs/ultrathink_medium.py --workdir=runs/ultrathink_medium
Size:     757M parameters
Hardware: one GPU of 40 GB or more
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="(AF)x24",
    vocab_size=50304,
    embed_dim=1536,
    tie_embeddings=True,
    num_heads=16,
    num_kv_heads=8,
    head_dim=96,
    mlp_dim=4608,
  )
  config.optimizer.update(learning_rate=3e-4, warmup_steps=2_000)
  config.train.update(steps=100_000, batch_size=64, sequence_length=4096)
  config.evaluate.every_steps = 1000
  config.checkpoint.every_steps = 1000
  return config
