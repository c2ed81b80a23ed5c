"""Optimizers with their published constants, relative to a config that is set for AdamW.

`config.optimizer` is applied as it stands, whatever its name; these set it. In a config file:

    def get_config():
      return optimizers.lion(nano.get_config())
"""

from ml_collections import ConfigDict


def lion(config: ConfigDict) -> ConfigDict:
  """Steps of one size need a lower rate, and as much more decay (arXiv:2302.06675 section 5)."""
  optimizer = config.optimizer
  optimizer.update(name="lion", beta1=0.9, beta2=0.99)
  optimizer.learning_rate *= 0.3
  optimizer.weight_decay *= 10
  return config


def sophia(config: ConfigDict) -> ConfigDict:
  """arXiv:2305.14342; rho as in its authors' code. The learning rate is about AdamW's."""
  config.optimizer.update(name="sophia", beta1=0.965, beta2=0.99)
  config.optimizer.sophia.update(rho=0.04, every_steps=10)
  return config


def galore(config: ConfigDict, rank: int = 256) -> ConfigDict:
  """arXiv:2403.03507. The rate of matrices is `scale` times the learning rate."""
  config.optimizer.update(name="galore")
  config.optimizer.galore.update(rank=rank, every_steps=200, scale=0.25)
  return config


def muon(config: ConfigDict) -> ConfigDict:
  """kellerjordan.github.io/posts/muon; the learning rate and the decay are AdamW's (arXiv:2502.16982)."""
  config.optimizer.update(name="muon", beta1=0.95, beta2=0.95)
  return config


def adafactor(config: ConfigDict) -> ConfigDict:
  """arXiv:1804.04235: no momentum, and so hardly any state."""
  config.optimizer.update(name="adafactor", beta1=0.0)
  return config


def sgd(config: ConfigDict, learning_rate: float) -> ConfigDict:
  """Momentum of 0.9; no learning rate of AdamW's tells which one it needs."""
  config.optimizer.update(name="sgd", beta1=0.9, learning_rate=learning_rate)
  return config


def schedule_free(config: ConfigDict) -> ConfigDict:
  """arXiv:2405.15682: a constant rate behind the warm-up, and an average that is evaluated."""
  config.optimizer.update(name="schedule_free", beta1=0.9, schedule="constant", average_decay=0.0)
  return config
