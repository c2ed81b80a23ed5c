"""Training methods by name; `--config.recipe` picks one."""

from collections.abc import Callable

from ultrathink_jax.config import Config
from ultrathink_jax.recipes.pretrain import make_pretrain
from ultrathink_jax.types import Recipe

RECIPES: dict[str, Callable[[Config], Recipe]] = {"pretrain": make_pretrain}
