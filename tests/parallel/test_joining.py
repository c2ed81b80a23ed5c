"""How processes find each other and how the watch notices what happens to one; whole runs: tests/test_processes.py."""

import queue
import socket
import threading
import time

import jax
import numpy as np
import pytest

from tests.conftest import tiny_config
from ultrathink_jax.errors import ConfigError, PeerError
from ultrathink_jax.parallel import peers, processes
from ultrathink_jax.parallel.mesh import make_mesh
from ultrathink_jax.parallel.placement import gather, place, rows_here

NO_FLAGS = {"coordinator": None, "num_processes": None, "process_id": None}
SLURM = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"}


def test_a_process_by_itself_joins_nobody():
  assert processes.find_settings(NO_FLAGS, {}) is None
  assert processes.find_settings(NO_FLAGS, {"SLURM_NTASKS": "4"}) is None  # the batch script, outside srun
  assert processes.find_settings({"coordinator": "h:1", "num_processes": 1, "process_id": 0}, {}) is None


def test_flags_come_before_variables_and_variables_before_the_cluster():
  variables = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
  assert processes.find_settings(NO_FLAGS, variables | SLURM) == ("environment", "a:1", 4, 3)
  assert processes.find_settings(NO_FLAGS | {"process_id": 2}, variables) == ("flags", "a:1", 4, 2)
  assert processes.find_settings(NO_FLAGS, SLURM) == ("SLURM", None, None, None)
  assert processes.find_settings(NO_FLAGS, {"OMPI_COMM_WORLD_SIZE": "2"}) == ("Open MPI", None, None, None)
  assert processes.find_settings(NO_FLAGS, {"TPU_WORKER_HOSTNAMES": "a,b"}) == ("TPU", None, None, None)


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ({"num_processes": 2}, "--num_processes=2 without --coordinator and --process_id"),
    ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "--process_id=2 is outside 0 to 1"),
    ({"coordinator": "h:1", "num_processes": 0, "process_id": 0}, "--num_processes=0"),
    ({"coordinator": "h", "num_processes": 2, "process_id": 0}, "--coordinator=h is not HOST:PORT"),
    ({"coordinator": "h:x", "num_processes": 2, "process_id": 0}, "--coordinator=h:x is not HOST:PORT"),
  ],
)
def test_settings_that_cannot_be_right_are_refused(flags, words):
  with pytest.raises(ConfigError, match=words):
    processes.find_settings(NO_FLAGS | flags, {})


def test_slurm_tells_every_task_where_to_meet_and_which_device_is_its_own(monkeypatch):
  tasks = {"SLURM_JOB_ID": "5000", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_NTASKS": "16", "SLURM_PROCID": "9"}
  for name, value in (tasks | {"SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2"}).items():
    monkeypatch.setenv(name, value)
  coordinator, count, index, devices = processes._ask_cluster("SLURM", [None, None, None])
  assert coordinator.startswith("node07:")
  assert (count, index, list(devices)) == (16, 9, [1])


def free_port():
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


@pytest.fixture
def watches(monkeypatch):
  """Returns three watches over one another and what each was told when it ended, as a queue of (index, code, line)."""
  monkeypatch.setattr(peers, "BEAT_SECONDS", 0.2)
  monkeypatch.setattr(peers, "SILENCE_SECONDS", 1.0)
  monkeypatch.setattr(peers, "_TICK_SECONDS", 0.05)
  ends = queue.Queue()

  end = lambda index: lambda code, line: ends.put((index, code, line))
  watches, address = {}, f"localhost:{free_port() - 1}"
  join = lambda index: watches.update({index: peers.meet(address, 3, index, 10, end(index))})
  threads = [threading.Thread(target=join, args=(index,)) for index in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  yield watches, ends
  for watch in watches.values():
    watch.close()


def told(ends, count):
  return {index: (code, line) for index, code, line in (ends.get(timeout=5) for _ in range(count))}


def hang_up(watch):
  """Closes the connections of a watch as the system does for a process that is killed, which says and hears no more."""
  watch._tell = watch._read = lambda *_: None
  for peer in list(watch._peers):
    peer.connection.shutdown(socket.SHUT_RDWR)


def test_a_peer_that_dies_is_named_to_all(watches):
  watches, ends = watches
  hang_up(watches[2])
  lines = told(ends, 2)
  assert lines[0] == lines[1]
  assert lines[0][0] == 6
  assert lines[0][1].startswith("peer 2 of 3 (")
  assert "is gone" in lines[0][1]
  assert "the same command resumes" in lines[0][1]


def test_the_loss_of_the_first_process_ends_the_others(watches):
  watches, ends = watches
  hang_up(watches[0])
  lines = told(ends, 2)
  assert {lines[index][0] for index in (1, 2)} == {6}
  assert all(lines[index][1].startswith("peer 0 of 3 (") for index in (1, 2))


def test_a_peer_that_falls_silent_is_lost(watches, monkeypatch):
  watches, ends = watches
  monkeypatch.setattr(watches[1], "_tell", lambda message: None)
  code, line = told(ends, 3)[0]  # the others end too, in any order
  assert code == 6
  assert line.startswith("peer 1 of 3 (")
  assert "hangs" in line


def test_peers_that_beat_or_said_goodbye_are_not_lost(watches):
  watches, ends = watches
  watches[1].close()
  time.sleep(1.5)  # longer than silence may last
  assert ends.empty()


def test_a_failure_reaches_all_with_its_own_exit_code(watches):
  watches, ends = watches
  watches[1].fail(3, "no such file")
  lines = told(ends, 3)  # the last of them is process 1, alive here, which the first one leaves
  assert {lines[index][0] for index in (0, 2)} == {3}
  assert all("peer 1 of 3" in line and "no such file" in line for _, line in (lines[0], lines[2]))


def test_a_process_that_does_not_come_is_named_and_strangers_do_not_count():
  port = free_port()
  found = queue.Queue()

  def come(index):
    try:
      peers.meet(f"localhost:{port - 1}", 3, index, 1.5, lambda code, line: None)
    except PeerError as error:
      found.put(str(error))

  threads = [threading.Thread(target=come, args=(index,)) for index in (0, 1)]
  for thread in threads:
    thread.start()
  time.sleep(0.3)
  with socket.create_connection(("localhost", port)) as stranger:
    stranger.sendall(b'{"index": 7, "host": "x"}\n')
    for thread in threads:
      thread.join()
  assert [found.get(timeout=5) for _ in threads] == ["process 2 of 3 has not come; see its log"] * 2


def test_a_port_that_is_taken_is_refused_in_one_line():
  with socket.create_server(("", 0)) as server, pytest.raises(PeerError, match="give --coordinator another"):
    peers.meet(f"localhost:{server.getsockname()[1] - 1}", 2, 0, 1, lambda code, line: None)


def test_a_cluster_that_does_not_tell_where_to_meet_is_refused():
  with pytest.raises(ConfigError, match="Open MPI does not tell where the processes meet"):
    processes.initialize(NO_FLAGS, {"OMPI_COMM_WORLD_SIZE": "2"})


def test_every_device_gets_its_rows_and_positions_of_the_batch():
  config = tiny_config(mesh={"data": 2, "fsdp": 2, "context": 2}, train={"batch_size": 8, "sequence_length": 16})
  mesh = make_mesh(config)
  batch = np.arange(8 * 16).reshape(8, 16)
  assert rows_here(mesh, 8).tolist() == list(range(8))
  placed = place(mesh, {"tokens": batch}, 8)["tokens"]
  assert placed.sharding.shard_shape(placed.shape) == (2, 8)
  np.testing.assert_array_equal(np.asarray(placed), batch)
  whole = gather(mesh, placed)
  assert len(whole.devices()) == 1
  np.testing.assert_array_equal(np.asarray(whole), batch)


def test_a_process_gives_only_the_rows_of_its_devices(monkeypatch):
  config = tiny_config(mesh={"data": 4, "tensor": 2}, train={"batch_size": 8, "sequence_length": 16})
  mesh = make_mesh(config)
  sharding = jax.sharding.NamedSharding
  indices = sharding.addressable_devices_indices_map
  mine = set(mesh.devices[2:].flat)
  keep = lambda self, shape: {device: index for device, index in indices(self, shape).items() if device in mine}
  monkeypatch.setattr(sharding, "addressable_devices_indices_map", keep)
  assert rows_here(mesh, 8).tolist() == [4, 5, 6, 7]
