"""ULTRATHINK large: a dense decoder with tied embeddings.

Goal:     the named size, with the feed-forward width that makes the name true.
Command:  python -m ultrathink_jax.main --config=configs/ultrathink_large.py --workdir=runs/ultrathink_large
Size:     1.29B parameters
Hardware: one GPU of 80 GB or more
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="(AF)x32",
    vocab_size=50304,
    embed_dim=2048,
    tie_embeddings=True,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    mlp_dim=4352,
  )
  config.optimizer.update(learning_rate=3e-4, warmup_steps=2_000)
  config.train.update(steps=100_000, batch_size=64, sequence_length=2048)
  config.evaluate.every_steps = 1000
  config.checkpoint.every_steps = 1000
  return config
