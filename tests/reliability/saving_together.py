"""Saves as one of several processes, of which the last cannot write once, and restores what is not damaged.

python -m tests.reliability.saving_together DIRECTORY
"""

import errno
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tests.train.saving import assert_same_bits, settings
from ultrathink_jax.parallel import processes
from ultrathink_jax.parallel.devices import configure_jax
from ultrathink_jax.testing.damage import flip_bit
from ultrathink_jax.train import digests
from ultrathink_jax.train.checkpoint import Checkpoints, shapes_on
from ultrathink_jax.train.initializing import initialize_from
from ultrathink_jax.types import TrainState


def begin(step):
  params = {"w": jnp.arange(4800.0).reshape(48, 100) * step, "b": jnp.ones(()) * step}
  return TrainState(jnp.int32(step), params, jax.tree.map(lambda x: x * 2, params), ())


def failing(*args):
  raise OSError(errno.EIO, os.strerror(errno.EIO))


def local(tree):
  """Returns what this process holds of each array."""
  return jax.tree.map(lambda x: np.stack([np.asarray(shard.data) for shard in x.addressable_shards]), tree)


def run(directory: Path) -> None:
  mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
  place = lambda x: NamedSharding(mesh, PartitionSpec("fsdp") if x.ndim else PartitionSpec())
  shardings = jax.tree.map(place, jax.eval_shape(lambda: begin(0)))
  state_at = lambda step: jax.jit(lambda: begin(step), out_shardings=shardings)()
  say = lambda line: print(line, flush=True)
  is_last = processes.process_index() == processes.num_processes() - 1
  with jax.set_mesh(mesh), Checkpoints(directory, settings(every_steps=2, keep_last=3), say) as checkpoints:
    read_files = digests.read_files
    for step in range(1, 9):
      digests.read_files = failing if step == 4 and is_last else read_files
      if checkpoints.due(step):
        say(f"save {step}")
        checkpoints.save(state_at(step), step, {"step": step}, value=float(step))
        checkpoints._commit.join()
    checkpoints.wait()
    say(f"steps {checkpoints.steps()} best {checkpoints.best_step()}")
    if processes.is_first():
      flip_bit(directory / "8" / "optimizer", 0)
    processes.barrier("damaged")
  with jax.set_mesh(mesh), Checkpoints(directory, settings(), say) as checkpoints:
    step = checkpoints.newest_intact()
    state, position = checkpoints.restore(step, shapes_on(jax.eval_shape(lambda: begin(0)), shardings))
    assert position == {"step": step}
    assert_same_bits(local(state), local(state_at(step)))
    assert_same_bits(local(initialize_from(directory, state_at(1).params, say)), local(state_at(step).params))
    say(f"restored {step}")


if __name__ == "__main__":
  configure_jax()
  with processes.joined(dict.fromkeys(processes.VARIABLES), os.environ, True):
    run(Path(sys.argv[1]))
