"""What follows from a configuration without running it: tokens, learning rates, groups of parameters, memory."""

import dataclasses
import math
from typing import Any

import jax

from ultrathink_jax.config import Config, OptimizerConfig
from ultrathink_jax.lora.coverage import flops_per_token
from ultrathink_jax.models.components import COMPONENTS, component
from ultrathink_jax.models.counts import count_model
from ultrathink_jax.models.matrices import path_name
from ultrathink_jax.optimizers.groups import groups
from ultrathink_jax.optimizers.schedules import num_warmup_steps
from ultrathink_jax.parallel.devices import Devices
from ultrathink_jax.train.plan import Plan
from ultrathink_jax.train.preflight import USABLE


def static_facts(config: Config, plan: Plan, devices: Devices, train_tokens: int | None) -> dict[str, Any]:
  """Returns everything known before the first step; `train_tokens` is the size of the training data, where known."""
  return {
    "model": {"layers": config.model.layers, "vocab_size": config.model.vocab_size},
    "steps": step_arithmetic(config, train_tokens),
    "learning_rates": learning_rates(config, plan),
    "parameters": parameter_groups(config.optimizer, plan.shapes.params),
    "memory": memory(plan, devices),
  }


def step_arithmetic(config: Config, train_tokens: int | None) -> dict[str, Any]:
  """Returns what a step, an epoch and the run come to; what needs the size of the data is None without it."""
  train = config.train
  count = count_model(config.model)
  tokens = train.batch_size * train.sequence_length
  warmup = num_warmup_steps(config.optimizer, train.steps)
  per_step = config.train.batch_size, train.micro_batch_size, train.accumulation_steps
  return {
    **dict(zip(("batch_size", "micro_batch_size", "accumulation_steps"), per_step, strict=True)),
    "sequence_length": train.sequence_length,
    "tokens_per_step": tokens,
    "steps": train.steps,
    "tokens": tokens * train.steps,
    "parameters": count.total,
    "active_parameters": count.active,
    "tokens_per_parameter": tokens * train.steps / count.total,
    "flops_per_token": flops_per_token(config, count),
    "warmup_steps": warmup,
    "warmup_share": warmup / train.steps,
    "evaluations": math.ceil(train.steps / (config.evaluate.every_steps or train.steps)),
    "saves": math.ceil(train.steps / config.checkpoint.every_steps),
    "train_tokens": train_tokens,
    "steps_per_epoch": train_tokens / tokens if train_tokens else None,
    "epochs": tokens * train.steps / train_tokens if train_tokens else None,
  }


def learning_rates(config: Config, plan: Plan) -> list[dict[str, Any]]:
  """Returns the learning rate of the steps, counted from 1, that tell the shape of the schedule."""
  steps, warmup = config.train.steps, num_warmup_steps(config.optimizer, config.train.steps)
  quarters = [steps // 4, steps // 2, 3 * steps // 4]
  chosen = sorted({step for step in (1, warmup // 2, warmup, warmup + 1, *quarters, steps) if 1 <= step <= steps})
  return [{"step": step, "learning_rate": float(plan.schedule(step - 1))} for step in chosen]


def parameter_groups(config: OptimizerConfig, params: Any) -> dict[str, dict[str, int]]:
  """Returns, of each component of the model, how many parameters weight decay pulls at and how many it leaves."""
  counts = {name: {"decayed": 0, "not_decayed": 0} for name in COMPONENTS}
  of_leaves = groups(config, params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    kind = "decayed" if of_leaves[path_name(path)].is_decayed else "not_decayed"
    counts[component(path)][kind] += math.prod(leaf.shape)
  return {name: count for name, count in counts.items() if sum(count.values())}


def memory(plan: Plan, devices: Devices) -> dict[str, int]:
  """Returns bytes of one device: what a step needs by the estimate, and what it may use."""
  return {
    **dataclasses.asdict(plan.need),
    "need_bytes": plan.need.total,
    "have_bytes": int(devices.memory_bytes * USABLE),
  }
