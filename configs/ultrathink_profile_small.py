"""ULTRATHINK profile small: the published hyper-parameters, taken literally.

Goal:     the guide's YAML profile; its name is not its size.
Command:  python -m ultrathink_jax.main --config=configs/ultrathink_profile_small.py --workdir=runs/small
Size:     see mode describe
Hardware: one GPU
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.update(
    layers="(AF)x6",
    vocab_size=100352,
    embed_dim=512,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    mlp_dim=2048,
    rope={"theta": 500000.0},
  )
  config.optimizer.update(learning_rate=3e-4, warmup_steps=2_000)
  config.train.update(steps=100_000, batch_size=32, sequence_length=1024, accumulation_steps=8)
  return config
