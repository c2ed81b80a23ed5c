"""What looks wrong with training data, in sentences that say what to do."""

from typing import Any

from ultrathink_jax.config import Config

_MAX_EPOCHS = 4  # beyond, repeated data teaches less and less. Source: arXiv:2305.16264
_MAX_LEFT_OUT = 0.1  # share of the entries
_MIN_BYTES_PER_TOKEN = 2.0
_MAX_EMPTY = 0.01  # share of the documents without a learned token
_MIN_LEARNED = 0.05  # share of the tokens
_MIN_ENDS = 0.5  # share of the documents whose end is learned
_MAX_PADDING = 0.1  # share of the positions
_MAX_CUT = 0.5  # share of the documents, where another packing cuts less than half as many


def findings(config: Config, facts: dict[str, Any]) -> list[str]:
  """Returns a sentence for everything that a person should look at first."""
  found = [sentence for source in facts["sources"] for sentence in _about_source(config, source)]
  if not facts["splits"]["validation"]["documents"]:
    found.append("there are no validation documents, which training needs; raise data.validation_fraction")
  return found + _about_packing(config, facts)


def _about_source(config: Config, source: dict[str, Any]) -> list[str]:
  found, name = [], source["source"]
  left_out = sum(source["left_out"].values())
  entries = left_out + sum(split["documents"] for split in source["splits"].values())
  if source["is_preference"] and config.recipe == "pretrain":
    found.append(f"{name} holds preferences, which recipe=pretrain does not read")
  elif not source["rows"]:
    found.append(f"{name} is not read at all; give it a weight above 0")
  elif source["epochs"] > _MAX_EPOCHS:
    found.append(
      f"the run goes {source['epochs']:,.1f} times through {name}, which teaches less and less after {_MAX_EPOCHS} "
      "times; give more text or fewer steps"
    )
  if left_out > _MAX_LEFT_OUT * entries:
    found.append(f"{left_out:,} of the {entries:,} entries of {name} are left out; see {source['rejects']}")
  ratio = source["splits"]["train"]["bytes_per_token"]
  if ratio is not None and ratio < _MIN_BYTES_PER_TOKEN:
    found.append(f"a token of {name} is {ratio:.1f} bytes of text; another or a larger tokenizer would fit better")
  if source["not_learned"] > _MAX_EMPTY:
    found.append(f"nothing is learned of {source['not_learned']:.0%} of the documents of {name}; look at its format")
  if source["ends_learned"] < _MIN_ENDS:
    found.append(
      f"the end of {1 - source['ends_learned']:.0%} of the documents of {name} is not learned, so that a model would "
      "not know when to stop; look at what its format, or chat template, puts last"
    )
  if source["learned"] < _MIN_LEARNED:
    found.append(f"only {source['learned']:.1%} of the tokens of {name} are learned")
  return found


def _about_packing(config: Config, facts: dict[str, Any]) -> list[str]:
  packed = facts["packings"][-1]
  chosen = packed[config.data.packing]
  if chosen["efficiency"] < packed["split"]["efficiency"] - _MAX_PADDING:
    return [
      f"{1 - chosen['efficiency']:.0%} of the positions are padding with data.packing={config.data.packing}; "
      f"with split it would be {1 - packed['split']['efficiency']:.0%}"
    ]
  if chosen["cut"] > _MAX_CUT and packed["best_fit"]["cut"] < chosen["cut"] / 2:
    return [
      f"{chosen['cut']:.0%} of the documents are cut with data.packing={config.data.packing}; best_fit would cut "
      f"{packed['best_fit']['cut']:.0%} and leave {1 - packed['best_fit']['efficiency']:.1%} of the positions empty"
    ]
  return []
