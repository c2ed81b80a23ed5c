"""A model as lm-eval-harness sees it. Importing this imports lm_eval: see harness.py, which does so when asked to."""

import json
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from ultrathink_jax.config import GenerateConfig, ModelConfig
from ultrathink_jax.data.tokenizer import Tokenizer
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.evaluate.scoring import make_score, score_all
from ultrathink_jax.evaluate.windows import Scored
from ultrathink_jax.generate.engine import generate

_MAX_NEW_TOKENS = 256  # where a task does not say, as for the harness's own models
_SAMPLING = {"do_sample", "temperature", "top_p", "top_k"}


@runtime_checkable
class Loaded(Protocol):
  """A model with its tokenizer, such as `ultrathink_jax.load` returns."""

  config: ModelConfig
  params: Any
  tokenizer: Tokenizer


class HarnessModel(TemplateLM):
  """Answers the requests of the harness: log-likelihoods, rolling ones, and completions.

  Every sequence begins with BOS. One longer than `window_tokens` is read in windows that overlap by half, so that
  nothing is cut off.
  """

  def __init__(self, model: Loaded, window_tokens: int, batch_size: int = 8, seed: int = 0):
    super().__init__()
    self._model, self._size, self._batch_size, self._seed = model, window_tokens, batch_size, seed
    self._score = make_score(model.config)

  @property
  def eot_token_id(self) -> int:
    return self._model.tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    return self._model.tokenizer.bos_id

  @property
  def tokenizer_name(self) -> str:
    return self._model.tokenizer.fingerprint

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
    return self._model.tokenizer.encode(string)

  def _loglikelihood_tokens(
    self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
  ) -> list[tuple[float, bool]]:
    """Returns the log-likelihood of each continuation and whether greedy decoding would give it."""
    sequences = []
    for _, context, continuation in requests:
      begin = [] if context[:1] == [self.prefix_token_id] else [self.prefix_token_id]
      sequences.append(_scored([*begin, *context], continuation))
    answers = self._answer(sequences)
    for (texts, _, _), answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial("loglikelihood", texts, answer)
    return answers

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
    """Returns the log-likelihood of each whole text, without an end."""
    texts = [request.args[0] for request in requests]
    sequences = [_scored([self.prefix_token_id], self.tok_encode(text)) for text in texts]
    likelihoods = [likelihood for likelihood, _ in self._answer(sequences)]
    for request, likelihood in zip(requests, likelihoods, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, likelihood)
    return likelihoods

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """Returns a completion of each context, cut before the first of the texts that end it."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
      groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
    texts = [""] * len(requests)
    for numbers in groups.values():
      sampling = _sampling(requests[numbers[0]].args[1], self._seed)
      for start in range(0, len(numbers), self._batch_size):
        batch = numbers[start : start + self._batch_size]
        prompts = [requests[number].args[0] for number in batch]
        completions = generate(self._model.config, self._model.params, self._model.tokenizer, prompts, sampling)
        for number, text in zip(batch, completions, strict=True):
          texts[number] = text
          self.cache_hook.add_partial("generate_until", requests[number].args, text)
    return texts

  def _answer(self, sequences: Sequence[Scored]) -> list[tuple[float, bool]]:
    [scores] = score_all(self._score, [self._model.params], sequences, self._size, self._batch_size)
    is_greedy = scores.correct == scores.targets
    return list(zip((-scores.nats).tolist(), is_greedy.tolist(), strict=True))


def _scored(context: list[int], continuation: list[int]) -> Scored:
  counts = np.repeat([False, True], [len(context), len(continuation)])
  return Scored(np.array([*context, *continuation], np.int32), counts)


def _sampling(settings: dict[str, Any], seed: int) -> GenerateConfig:
  """Returns how a task wants its completions; it is greedy unless it says otherwise. Raises ConfigError."""
  unknown = settings.keys() - _SAMPLING - {"until", "max_gen_toks"}
  if unknown:
    known = ", ".join(sorted(_SAMPLING | {"until", "max_gen_toks"}))
    raise ConfigError(f"generation_kwargs {', '.join(sorted(unknown))}: not known here; a task may set {known}")
  until = settings.get("until") or ()
  temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
  return GenerateConfig(
    max_new_tokens=int(settings.get("max_gen_toks", _MAX_NEW_TOKENS)),
    temperature=temperature,
    top_k=int(settings.get("top_k", 0)),
    top_p=float(settings.get("top_p", 1.0)),
    repetition_penalty=1.0,
    stop=(until,) if isinstance(until, str) else tuple(until),
    seed=seed,
  )
