"""Training methods by name; `--config.recipe` picks one."""

import difflib
from collections.abc import Callable

from ultrathink_jax.config import Config
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.lora.adapting import adapted
from ultrathink_jax.recipes.pretrain import make_pretrain
from ultrathink_jax.recipes.sft import make_sft
from ultrathink_jax.types import Recipe

RECIPES: dict[str, Callable[[Config], Recipe]] = {"pretrain": make_pretrain, "sft": make_sft}


def find_recipe(config: Config) -> Recipe:
  """Returns the recipe of a run, over a frozen base where the run is adapted. Raises ConfigError."""
  if config.recipe not in RECIPES:
    near = difflib.get_close_matches(config.recipe, RECIPES, 1)
    raise ConfigError(
      f"recipe={config.recipe!r} is not one of {', '.join(RECIPES)}" + (f"; {near[0]}?" if near else "")
    )
  recipe = RECIPES[config.recipe](config)
  return adapted(config, recipe) if config.is_adapted else recipe
