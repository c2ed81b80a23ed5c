"""Instruction tuning of a model that is here: --config=configs/sft.py:BASE, a workdir or a model's directory.

Goal:     answer as the examples do. Entries are {prompt, completion}, {messages}, or questions and answers; only what
          follows a prompt is learned.
Command:  python -m ultrathink_jax.main --config=configs/sft.py:runs/nano --workdir=runs/sft
            --config.data.source=jsonl:instructions.jsonl
Expected: the loss of held-out answers falls from the first evaluation on; with --config.lora.rank=16 by adapters alone
"""

from ml_collections import ConfigDict

from configs import lora


def get_config(path: str = "") -> ConfigDict:
  config = lora.get_config(path)
  config.recipe = "sft"
  config.lora.rank = 0
  config.data.packing = "best_fit"
  config.optimizer.update(learning_rate=2e-5)
  config.train.update(epochs=3.0, batch_size=16, sequence_length=1024)
  return config
