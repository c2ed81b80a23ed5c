"""Low-rank adapters on the quick-start model: a code tree that it has not seen, in minutes on two CPU cores.

Goal:     adapt attention, Mamba-2 and feed-forward layers of runs/nano; experts and routers stay as they are.
Command:  python -m ultrathink_jax.main --config=configs/nano_lora.py --workdir=runs/nano_lora
            --config.data.source=code:PATH
Hardware: two CPU cores, two minutes
"""

from ml_collections import ConfigDict

from configs import nano


def get_config() -> ConfigDict:
  config = nano.get_config()
  config.checkpoint.init_from = "runs/nano"
  config.lora.update(rank=16, alpha=32.0, targets=("attention", "mamba", "mlp"))
  config.optimizer.update(learning_rate=2e-3, warmup_steps=20, weight_decay=0.01)
  config.train.update(steps=300, batch_size=4, sequence_length=512)
  config.evaluate.update(every_steps=100)
  config.checkpoint.update(every_steps=100)
  return config
