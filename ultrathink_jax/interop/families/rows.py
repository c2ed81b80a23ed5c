"""Rows that families share: attention, gated feed-forward layers, Mamba-2, experts, and what is outside the layers."""

from ultrathink_jax.interop.families.family import BANK, CONV, FLAT, LINEAR, LINEAR_FROM_HEADS, TABLE, Row, row


def outside(embedding: str, final_norm: str) -> tuple[Row, ...]:
  return (
    row(f"{embedding}.weight", "embedding.table", transform=TABLE),
    row(f"{final_norm}.weight", "final_norm.scale", transform=FLAT),
    row("lm_head.weight", "unembedding.kernel", transform=TABLE),
  )


def norm(name: str) -> tuple[Row, ...]:
  return (row(f"{name}.weight", "norm.scale", transform=FLAT),)


def attention(name: str) -> tuple[Row, ...]:
  return (
    row(f"{name}.q_proj.weight", "mixer.query.kernel"),
    row(f"{name}.k_proj.weight", "mixer.key.kernel"),
    row(f"{name}.v_proj.weight", "mixer.value.kernel"),
    row(f"{name}.o_proj.weight", "mixer.out.kernel", transform=LINEAR_FROM_HEADS),
    row(f"{name}.q_proj.bias", "mixer.query.bias", transform=FLAT),
    row(f"{name}.k_proj.bias", "mixer.key.bias", transform=FLAT),
    row(f"{name}.v_proj.bias", "mixer.value.bias", transform=FLAT),
    row(f"{name}.o_proj.bias", "mixer.out.bias", transform=FLAT),
    row(f"{name}.q_norm.weight", "mixer.query_norm.scale", transform=FLAT),
    row(f"{name}.k_norm.weight", "mixer.key_norm.scale", transform=FLAT),
  )


def feed_forward(name: str, ours: str = "mixer") -> tuple[Row, ...]:
  """Returns the rows of gate, up and down; activations without a gate have no gate_proj."""
  return tuple(
    row(f"{name}.{part}_proj.{theirs}", f"{ours}.{part}.{leaf}", transform=transform)
    for part in ("gate", "up", "down")
    for theirs, leaf, transform in (("weight", "kernel", LINEAR), ("bias", "bias", FLAT))
  )


def joined_feed_forward(name: str, ours: str) -> tuple[Row, ...]:
  """Returns the rows of a feed-forward layer whose gate and up projections are one tensor."""
  return (
    row(f"{name}.input_linear.weight", f"{ours}.gate.kernel", f"{ours}.up.kernel"),
    row(f"{name}.output_linear.weight", f"{ours}.down.kernel"),
  )


def mamba(name: str) -> tuple[Row, ...]:
  streams = ("gate", "x", "b", "c", "dt")
  return (
    row(f"{name}.in_proj.weight", *(f"mixer.{stream}.kernel" for stream in streams)),
    row(f"{name}.in_proj.bias", *(f"mixer.{stream}.bias" for stream in streams), transform=FLAT),
    row(f"{name}.conv1d.weight", *(f"mixer.conv_{stream}.kernel" for stream in "xbc"), transform=CONV),
    row(f"{name}.conv1d.bias", *(f"mixer.conv_{stream}.bias" for stream in "xbc"), transform=FLAT),
    row(f"{name}.dt_bias", "mixer.dt_bias", transform=FLAT),
    row(f"{name}.A_log", "mixer.a_log", transform=FLAT),
    row(f"{name}.D", "mixer.d", transform=FLAT),
    row(f"{name}.norm.weight", "mixer.norm.scale", transform=FLAT),
    row(f"{name}.out_proj.weight", "mixer.out.kernel", transform=LINEAR_FROM_HEADS),
    row(f"{name}.out_proj.bias", "mixer.out.bias", transform=FLAT),
  )


def experts(name: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
  """Returns the rows of experts with a tensor each."""
  return (
    row(f"{name}.{{}}.{gate}.weight", "mixer.gate.kernel"),
    row(f"{name}.{{}}.{up}.weight", "mixer.up.kernel"),
    row(f"{name}.{{}}.{down}.weight", "mixer.down.kernel"),
  )


def fused_experts(gate_up: str, down: str) -> tuple[Row, ...]:
  """Returns the rows of experts that share a tensor, gate rows before up rows."""
  return (
    row(gate_up, "mixer.gate.kernel", "mixer.up.kernel", transform=BANK),
    row(down, "mixer.down.kernel", transform=BANK),
  )


def router(name: str) -> tuple[Row, ...]:
  return (row(f"{name}.weight", "mixer.router.kernel"),)
