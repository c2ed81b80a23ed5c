"""Mixtral 8x22B adapted to a code base, as configs/mixtral_8x7b_lora.py does, over a base in 4 bits.

Goal:     the larger model with the guide's settings on the same four cards.
Command:  python -m ultrathink_jax.main --config=configs/mixtral_8x22b_lora.py --workdir=runs/mixtral_8x22b_lora
            --config.data.source=code:PATH
Size:     of 140.6B parameters; the frozen ones take 0.56 bytes each
Hardware: 4 H200
"""

from ml_collections import ConfigDict

from configs import mixtral_8x7b_lora, mixtral_8x22b


def get_config(preset: str = "balanced") -> ConfigDict:
  config = mixtral_8x7b_lora.adapt(mixtral_8x22b.get_config(), "runs/mixtral_8x22b", preset)
  config.lora.base_dtype = "nf4"
  return config
