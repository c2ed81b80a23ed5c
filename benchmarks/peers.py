"""The peer's side of a measurement: PyTorch with transformers, given every fair chance.

- The peer's model is made from our ModelConfig and has the same number of parameters.
- Training is forward with labels, backward and AdamW, in the faster of its fused and foreach forms, found by trying.
  Gradients are set to None and are not clipped, and the routing losses of experts are left out: our step has both, so
  this is in the peer's favour. bfloat16 is autocast over float32 parameters, as ours.
- Attention is scaled_dot_product_attention. Mixtral's experts run in every form that is made for the task, each as a
  contestant of its own: loop over experts ("eager"), grouped_mm, and for decoding batched_mm (in training that one
  would copy the weights of an expert for every token: 10 GB already at the tiny shape).
- Every contestant also runs under torch.compile, except decoding, whose cache grows.
- As many threads as cores. On a GPU, float32 products may use TensorFloat-32, as ours do.
- transformers' Mamba-2 uses the kernels of the packages mamba_ssm and causal_conv1d, which are for GPUs only, where
  these are installed.
"""

import time
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.environment import num_cores
from benchmarks.shapes import random_tokens
from ultrathink_jax import patterns
from ultrathink_jax.config import Config, ModelConfig

_TRIALS = 3  # steps with each form of the optimizer before one is chosen


def make_model(model: ModelConfig, experts: str | None) -> torch.nn.Module:
  """Returns the transformers model of the same architecture and size, in float32.

  Raises:
    ValueError: transformers has no such architecture.
  """
  letters = patterns.spell(patterns.parse(model.layers, "ALMFE"))
  blocks = [letters[place : place + 2] for place in range(0, len(letters), 2)]
  if set(letters) == {"M"}:
    peer = transformers.Mamba2ForCausalLM(_mamba2(model, len(letters)))
  elif set(blocks) == {"AF"}:
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_decoder(model, len(blocks))))
  elif set(blocks) == {"AE"}:
    peer = transformers.MixtralForCausalLM(
      transformers.MixtralConfig(
        **_decoder(model, len(blocks)) | {"intermediate_size": model.expert_dim},
        num_local_experts=model.num_experts,
        num_experts_per_tok=model.experts_per_token,
        experts_implementation=experts,
        output_router_logits=False,
      )
    )
  elif set(blocks) == {"AF", "MF"}:
    peer = transformers.BambaForCausalLM(_bamba(model, blocks))
  else:
    raise ValueError(
      f"transformers has no architecture of the layers {model.layers!r}; compare dense, moe, mamba or hybrid"
    )
  return peer


def _decoder(model: ModelConfig, num_blocks: int) -> dict[str, Any]:
  """Returns what the configurations of all models with attention share."""
  return {
    "vocab_size": model.vocab_size,
    "hidden_size": model.embed_dim,
    "intermediate_size": model.mlp_dim,
    "num_hidden_layers": num_blocks,
    "num_attention_heads": model.num_heads,
    "num_key_value_heads": model.num_kv_heads,
    "head_dim": model.head_dim,
    "rms_norm_eps": model.norm_epsilon,
    "tie_word_embeddings": model.tie_embeddings,
    "attn_implementation": "sdpa",
  }


def _mamba2(model: ModelConfig, num_layers: int) -> transformers.Mamba2Config:
  return transformers.Mamba2Config(
    vocab_size=model.vocab_size,
    hidden_size=model.embed_dim,
    num_hidden_layers=num_layers,
    num_heads=model.mamba_heads,
    head_dim=model.mamba_head_dim,
    state_size=model.mamba_state_dim,
    n_groups=model.mamba_num_groups,
    conv_kernel=model.mamba_conv_width,
    expand=model.mamba_expand,
    chunk_size=model.mamba_chunk_tokens,
    layer_norm_epsilon=model.norm_epsilon,
    tie_word_embeddings=model.tie_embeddings,
  )


def _bamba(model: ModelConfig, blocks: list[str]) -> transformers.BambaConfig:
  decoder = _decoder(model, len(blocks))
  del decoder["head_dim"]  # Bamba's is hidden_size / num_attention_heads
  return transformers.BambaConfig(
    **decoder,
    attn_layer_indices=[place for place, block in enumerate(blocks) if block == "AF"],
    mamba_n_heads=model.mamba_heads,
    mamba_d_head=model.mamba_head_dim,
    mamba_d_state=model.mamba_state_dim,
    mamba_n_groups=model.mamba_num_groups,
    mamba_d_conv=model.mamba_conv_width,
    mamba_expand=model.mamba_expand,
    mamba_chunk_size=model.mamba_chunk_tokens,
  )


def _device() -> torch.device:
  """Returns where the peer runs, prepared."""
  torch.set_num_threads(num_cores())
  torch.manual_seed(0)
  transformers.logging.set_verbosity_error()
  if torch.cuda.is_available():
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")
  return torch.device("cpu")


def _wait(device: torch.device) -> None:
  if device.type == "cuda":
    torch.cuda.synchronize()


class TorchTraining:
  """Calls are optimizer steps."""

  def __init__(self, config: Config, experts: str | None, is_compiled: bool):
    self._device = _device()
    self._dtype = getattr(torch, config.model.dtype)
    self._model = make_model(config.model, experts).to(self._device).train()
    self._tokens = torch.from_numpy(random_tokens(config).astype(np.int64)).to(self._device)
    self.tokens_per_call = self._tokens.numel()
    self.first_loss = self._forward(self._model).item()
    self._run = torch.compile(self._model) if is_compiled else self._model
    self._optimizer, self.optimizer_form = self._fastest_optimizer(config)

  def _forward(self, model: torch.nn.Module) -> torch.Tensor:
    with torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
      return model(input_ids=self._tokens, labels=self._tokens, use_cache=False).loss

  def _step(self, optimizer: torch.optim.Optimizer) -> None:
    self._loss = self._forward(self._run)
    self._loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  def _fastest_optimizer(self, config: Config) -> tuple[torch.optim.Optimizer, str]:
    """Returns the form of AdamW whose quickest update was quicker, and its name; trials take turns."""
    c = config.optimizer
    make = lambda form: torch.optim.AdamW(
      self._model.parameters(), c.learning_rate, (c.beta1, c.beta2), c.epsilon, c.weight_decay, **{form: True}
    )
    optimizers = {form: make(form) for form in ("fused", "foreach")}
    seconds: dict[str, list[float]] = {form: [] for form in optimizers}
    for _ in range(_TRIALS):
      for form, optimizer in optimizers.items():
        self._forward(self._run).backward()
        _wait(self._device)
        begun = time.perf_counter()
        optimizer.step()
        _wait(self._device)
        seconds[form].append(time.perf_counter() - begun)
        optimizer.zero_grad(set_to_none=True)
    fastest = min(seconds, key=lambda form: min(seconds[form]))
    return optimizers[fastest], fastest

  def __call__(self, calls: int) -> float:
    """Returns the seconds that so many steps take."""
    begun = time.perf_counter()
    for _ in range(calls):
      self._step(self._optimizer)
    _wait(self._device)
    return time.perf_counter() - begun

  @property
  def loss(self) -> float:
    return self._loss.item()

  @property
  def facts(self) -> dict[str, Any]:
    return {
      "tokens_per_call": self.tokens_per_call,
      "parameters": sum(weight.numel() for weight in self._model.parameters()),
      "first_loss": self.first_loss,
      "optimizer": self.optimizer_form,
    }


class TorchDecoding:
  """Calls are two greedy generations with a cache; their difference is decoding alone, as in ours.OurDecoding."""

  def __init__(
    self, config: Config, experts: str | None, batch_size: int, prompt_tokens: int, new_tokens: int, first_tokens: int
  ):
    self._device = _device()
    # Weights that are only read may be stored in the dtype they are used in.
    model = make_model(config.model, experts).to(getattr(torch, config.model.dtype))
    self._model = model.to(self._device).eval()
    prompts = np.random.default_rng(0).integers(0, config.model.vocab_size, (batch_size, prompt_tokens))
    self._prompts = torch.from_numpy(prompts).to(self._device)
    self._lengths = (first_tokens, first_tokens + new_tokens)
    self.tokens_per_call = batch_size * new_tokens
    self(1)

  def _generation_seconds(self, num_tokens: int) -> float:
    begun = time.perf_counter()
    with torch.inference_mode():
      out = self._model.generate(
        self._prompts,
        attention_mask=torch.ones_like(self._prompts),
        max_new_tokens=num_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
      )
    _wait(self._device)
    assert out.shape[1] == self._prompts.shape[1] + num_tokens, "the peer ended a document early"
    return time.perf_counter() - begun

  def __call__(self, calls: int) -> float:
    """Returns the seconds of the tokens between the two lengths."""
    short, long = self._lengths
    return sum(self._generation_seconds(long) - self._generation_seconds(short) for _ in range(calls))

  @property
  def facts(self) -> dict[str, Any]:
    return {
      "tokens_per_call": self.tokens_per_call,
      "parameters": sum(weight.numel() for weight in self._model.parameters()),
    }
