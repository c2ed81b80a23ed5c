"""The lines of a run on the console."""

import math
from collections.abc import Mapping
from typing import Any

MOE_FORMATS = {"entropy": "{:.2f}", "max_expert": "{:.2f}", "dropped": "{:.1%}", "dead": "{}"}
MOE_NAMES = {"max_expert": "max"}  # shorter on the console


def format_step(step: int, total_steps: int, values: Mapping[str, Any]) -> str:
  """Returns the console line of a step.

  Example:
    [step] step=120/2000 loss=3.2145 ppl=24.9 toks/s=8,120 lr=2.9e-04 moe=[entropy=0.97 max=0.18 dropped=0.0%] grad=0.83

  moe=[...] and dre=[...] appear where `values` have such keys; dre=[...] shows every scalar under `dre/` by its name.
  moe=[...] ends with dead=N where experts are dead, and with each group's share and entropy as knowledge=51%/0.98.
  Where routers have a gradient norm of their own, grad=[total=0.83 router=0.02]; skipped=N follows where N steps of the
  run were not applied.
  """
  parts = [
    f"[step] step={step}/{total_steps}",
    f"loss={values['loss']:.4f}",
    f"ppl={_format_perplexity(values['loss'])}",
    f"toks/s={values['tokens_per_second']:,.0f}",
    f"lr={values['learning_rate']:.1e}",
  ]
  moe = _moe_parts(values)
  dre = [
    f"{key.removeprefix('dre/')}={value:.3g}"
    for key, value in values.items()
    if key.startswith("dre/") and not isinstance(value, (Mapping, list))
  ]
  parts += [f"{group}=[{' '.join(items)}]" for group, items in (("moe", moe), ("dre", dre)) if items]
  norm, of_routers = _format_norm(values["grad_norm"]), values.get("grad_norm/router")
  parts.append(f"grad={norm}" if of_routers is None else f"grad=[total={norm} router={_format_norm(of_routers)}]")
  if values.get("skipped_steps"):
    parts.append(f"skipped={values['skipped_steps']}")
  return " ".join(parts)


def _format_norm(norm: int | float) -> str:
  return f"{norm:.2f}" if norm == 0 or 0.01 <= abs(norm) < 1e4 else f"{norm:.1e}"


def _moe_parts(values: Mapping[str, Any]) -> list[str]:
  parts = []
  for name, spelling in MOE_FORMATS.items():
    value = values.get(f"moe/{name}")
    if value is not None and (name != "dead" or value):
      parts.append(f"{MOE_NAMES.get(name, name)}={spelling.format(value)}")
  for key, share in values.items():
    if key.startswith("moe/") and key.endswith("/share"):
      group = key.split("/")[1]
      entropy = values.get(f"moe/{group}/entropy")
      parts.append(f"{group}={share:.0%}" + ("" if entropy is None else f"/{entropy:.2f}"))
  return parts


def format_evaluation(step: int, values: Mapping[str, Any]) -> str:
  """Returns the console line of an evaluation; bits/byte is left out where the data has no bytes."""
  loss = values["evaluate/loss"]
  line = f"[evaluate] step={step} loss={loss:.4f} ppl={_format_perplexity(loss)}"
  bits = values.get("evaluate/bits_per_byte")
  return line if bits is None else f"{line} bits/byte={bits:.4f}"


def format_duration(seconds: int | float) -> str:
  """Returns 45s, 3m12s, 2h05m or 3d04h."""
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds}s"
  if seconds < 3600:
    return f"{seconds // 60}m{seconds % 60:02d}s"
  if seconds < 86400:
    return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"
  return f"{seconds // 86400}d{seconds // 3600 % 24:02d}h"


def _format_perplexity(loss: int | float) -> str:
  perplexity = math.exp(loss) if loss < 700 else loss * math.inf  # exp(710) overflows; NaN stays NaN
  if perplexity < 1000:
    return f"{perplexity:.1f}"
  return f"{perplexity:,.0f}" if perplexity < 1e6 else f"{perplexity:.1e}"
