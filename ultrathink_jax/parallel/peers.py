"""A watch over the other processes of a run: when one dies, hangs or fails, all end within seconds and say which.

The first process listens and every other one keeps a connection to it, over which both say that they live. A connection
that closes without a goodbye, or stays silent for too long, is a lost peer; a peer that fails says so and with which
exit code. The first process passes on what it learns.

JAX has a watch of its own, which takes longer, aborts with a stack trace and does not say which process is at fault.
"""

import dataclasses
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ultrathink_jax.errors import PeerError
from ultrathink_jax.parallel.stopping import Stopping

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 15.0  # several beats: a machine that swaps or compiles may miss some
_TICK_SECONDS = 0.5
_MAX_FIRST_BYTES = 1 << 22  # the welcome names every host


@dataclasses.dataclass
class _Peer:
  index: int
  host: str
  connection: socket.socket
  heard: float
  unread: bytes = b""


class Watch:
  """One process's view of its peers. `end(exit code, line)` is called, in a thread, when the run cannot go on.

  `stopping` is how the processes agree, over the same connections, on where to stop.
  """

  def __init__(self, index: int, hosts: Sequence[str], peers: Sequence[_Peer], end: Callable[[int, str], None]):
    self.hosts = tuple(hosts)
    self._index, self._peers, self._end = index, list(peers), end
    self._connections = [peer.connection for peer in peers]
    self._sending = threading.Lock()
    self._selector = selectors.DefaultSelector()
    for peer in peers:
      peer.connection.settimeout(BEAT_SECONDS)
      self._selector.register(peer.connection, selectors.EVENT_READ, peer)
    self.stopping = Stopping(index, len(self.hosts), self._tell)
    self._is_closed = False
    self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
    self._thread.start()

  def close(self) -> None:
    """Says goodbye: that this process ends is no loss to the others."""
    self._tell({"kind": "bye"})
    self._is_closed = True
    self._thread.join()

  def fail(self, code: int, line: str) -> None:
    """Tells the others that this process ends with `code`, and why; they do the same."""
    self._tell({"kind": "end", "code": code, "line": line[:2000]})

  def _run(self) -> None:
    try:
      self._watch()
    finally:
      self._selector.close()
      for connection in self._connections:
        connection.close()

  def _watch(self) -> None:
    next_beat = 0.0
    while not self._is_closed:
      for key, _ in self._selector.select(_TICK_SECONDS):
        if not self._is_closed:
          self._read(key.data)
      now = time.monotonic()
      if now >= next_beat:
        self._tell({"kind": "beat"})
        next_beat = now + BEAT_SECONDS
      for peer in list(self._peers):
        if now - peer.heard > SILENCE_SECONDS and not self._is_closed:
          self._lose(peer, f"hangs: no sign of life for {SILENCE_SECONDS:.0f} s")

  def _read(self, peer: _Peer) -> None:
    try:
      data = peer.connection.recv(1 << 16)
    except OSError:
      data = b""
    peer.heard = time.monotonic()
    peer.unread += data
    *lines, peer.unread = peer.unread.split(b"\n")
    for line in lines:
      message = json.loads(line)
      if message["kind"] == "bye":
        self._forget(peer)
        return
      if message["kind"] == "end":
        told_by_first = self._index != 0 and message.get("passed_on", False)
        text = message["line"] if told_by_first else f"{self._name(peer)} ended: {message['line']}"
        self._forget(peer)
        self._stop(message["code"], text)
        return
      if message["kind"] != "beat":
        self.stopping.hear(peer.index, message)
    if not data:
      self._lose(peer, "is gone: it closed its connection without a word")

  def _lose(self, peer: _Peer, how: str) -> None:
    self._forget(peer)
    self._stop(PeerError.exit_code, f"{self._name(peer)} {how}; the same command resumes from the last checkpoint")

  def _stop(self, code: int, line: str) -> None:
    self._tell({"kind": "end", "code": code, "line": line, "passed_on": True})
    self._is_closed = True
    self._end(code, line)

  def _forget(self, peer: _Peer) -> None:
    self._selector.unregister(peer.connection)
    self._peers.remove(peer)

  def _name(self, peer: _Peer) -> str:
    return f"peer {peer.index} of {len(self.hosts)} ({peer.host})"

  def _tell(self, message: dict[str, Any]) -> None:
    with self._sending:
      for peer in list(self._peers):
        try:
          _send(peer.connection, message)
        except OSError:  # a peer that cannot be reached is noticed where it is read
          continue


def watch_port(coordinator: str) -> tuple[str, int]:
  """Returns where the first process listens: beside the port, HOST:PORT, where JAX's processes meet."""
  host, _, port = coordinator.rpartition(":")
  return host.strip("[]"), int(port) + (1 if int(port) < 2**16 - 1 else -1)


def meet(coordinator: str, count: int, index: int, seconds: int | float, end: Callable[[int, str], None]) -> Watch:
  """Returns the watch of process `index` of `count`, when all have come.

  Raises:
    PeerError: one has not come within `seconds`, or the port is not free.
  """
  host, port = watch_port(coordinator)
  deadline = time.monotonic() + seconds
  return _join(host, port, index, deadline, end) if index else _gather(port, count, deadline, end)


def _gather(port: int, count: int, deadline: float, end: Callable[[int, str], None]) -> Watch:
  is_dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if is_dual else socket.AF_INET
  try:
    server = socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=is_dual)
  except OSError as error:
    raise PeerError(f"process 0 cannot listen at port {port}: {error.strerror}; give --coordinator another") from error
  peers: dict[int, _Peer] = {}
  with server:
    while len(peers) < count - 1:
      server.settimeout(max(0.01, deadline - time.monotonic()))
      try:
        connection, _ = server.accept()
      except OSError as error:
        missing = next(index for index in range(1, count) if index not in peers)
        line = f"process {missing} of {count} has not come; see its log"
        for peer in peers.values():
          _send(peer.connection, {"refused": line})
          peer.connection.close()
        raise PeerError(line) from error
      hello = _receive_first(connection)
      if hello and hello.get("index") in range(1, count) and hello["index"] not in peers:
        peers[hello["index"]] = _Peer(hello["index"], str(hello.get("host")), connection, time.monotonic())
      else:  # somebody who scans ports, or who has come twice
        connection.close()
  hosts = [socket.gethostname(), *(peers[index].host for index in range(1, count))]
  for peer in peers.values():
    _send(peer.connection, {"hosts": hosts})
  return Watch(0, hosts, list(peers.values()), end)


def _join(host: str, port: int, index: int, deadline: float, end: Callable[[int, str], None]) -> Watch:
  while True:  # the first process may come later
    try:
      connection = socket.create_connection((host, port), timeout=5)
      break
    except OSError as error:
      if time.monotonic() > deadline:
        raise PeerError(f"process {index} cannot reach process 0 at {host}:{port} ({error}); see its log") from error
      time.sleep(0.2)
  _send(connection, {"index": index, "host": socket.gethostname()})
  welcome = _receive_first(connection, max(1.0, deadline - time.monotonic()) + 5) or {}
  if "hosts" not in welcome:
    connection.close()
    raise PeerError(welcome.get("refused", f"process 0 at {host}:{port} has turned process {index} away; see its log"))
  return Watch(index, welcome["hosts"], [_Peer(0, welcome["hosts"][0], connection, time.monotonic())], end)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
  connection.sendall(json.dumps(message).encode() + b"\n")


def _receive_first(connection: socket.socket, seconds: int | float = 5.0) -> dict[str, Any] | None:
  """Returns the first message of a connection, None where it is none of ours."""
  connection.settimeout(seconds)
  line = b""
  try:
    while not line.endswith(b"\n") and len(line) < _MAX_FIRST_BYTES:
      byte = connection.recv(1)  # what follows the line is left for the watch
      if not byte:
        return None
      line += byte
    message = json.loads(line)
  except (OSError, ValueError):
    return None
  return message if isinstance(message, dict) else None
