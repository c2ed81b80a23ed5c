"""Adapters for a model that is here: --config=configs/lora.py:BASE, a workdir or a model's directory.

Goal:     adapt any model to a code base, or to other data, by a thousandth of its parameters.
Command:  python -m ultrathink_jax.main --config=configs/lora.py:runs/nano --workdir=runs/adapted
            --config.data.source=code:PATH
Expected: a lower loss on held-out files of the code, experts and routers as they were
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from configs import base


def get_config(path: str = "") -> ConfigDict:
  config = base.get_config()
  if path:
    from ultrathink_jax.interop.bases import saved_model

    config.model.update(dataclasses.asdict(saved_model(Path(path))))
  config.checkpoint.init_from = path
  config.lora.update(rank=16, alpha=32.0, targets=("attention",))
  config.optimizer.update(learning_rate=2e-4, warmup_ratio=0.03, weight_decay=0.01, beta2=0.999)
  return config
