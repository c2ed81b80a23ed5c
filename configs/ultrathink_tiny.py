"""ULTRATHINK tiny: a dense decoder with tied embeddings.

Goal:     the named size, with the feed-forward width that makes the name true.
Command:  python -m ultrathink_jax.main --config=configs/ultrathink_tiny.py --workdir=runs/ultrathink_tiny
Size:     125M parameters
Hardware: one GPU of 40 GB or more
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="(AF)x12",
    vocab_size=50304,
    embed_dim=768,
    tie_embeddings=True,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    mlp_dim=2432,
  )
  config.optimizer.update(learning_rate=3e-4, warmup_steps=2_000)
  config.train.update(steps=100_000, batch_size=64, sequence_length=2048)
  config.evaluate.every_steps = 1000
  config.checkpoint.every_steps = 1000
  return config
