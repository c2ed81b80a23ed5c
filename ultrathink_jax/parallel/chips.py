"""What one chip of each kind holds, computes and exchanges, by its vendor's public pages."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
  """Numbers of one device; bandwidths are in bytes per second and one direction.

  Attributes:
    memory_bytes: HBM.
    peak_flops: dense bfloat16 products.
    memory_bandwidth: HBM, reads and writes together.
    link_bandwidth: of one link to a neighbour in a torus, or of a GPU into the switch of its node.
    network_bandwidth: a device's share of the network between slices or nodes.
    torus_dims: 0 for a switch that reaches every device of a node alike.
    wrap_size: devices along a dim of the torus from which on its ends are connected.
    node_size: devices behind one switch; 0 for a torus.
  """

  platform: str  # that programs are compiled for
  memory_bytes: int
  peak_flops: float
  memory_bandwidth: float
  link_bandwidth: float
  network_bandwidth: float
  torus_dims: int = 0
  wrap_size: int = 0
  node_size: int = 0


_GIB = 2**30

CHIPS: dict[str, Chip] = {
  # docs.cloud.google.com/tpu/docs/v5e: 16 GB, 197 TFLOP/s, 800 GiB/s; 400 GB/s both ways over 4 links; 6.4 Tbit/s of
  # network per pod of 256. A dim of 16 wraps.
  "v5e": Chip("tpu", 16 * _GIB, 197e12, 819e9, 50e9, 3.125e9, torus_dims=2, wrap_size=16),
  # docs.cloud.google.com/tpu/docs/v5p: 95 GiB, 459 TFLOP/s, 2,765 GB/s; 1,200 GB/s both ways over 6 links; 50 Gbit/s of
  # network per chip. Slices of whole 4 x 4 x 4 cubes wrap.
  "v5p": Chip("tpu", 95 * _GIB, 459e12, 2765e9, 100e9, 6.25e9, torus_dims=3, wrap_size=4),
  # docs.cloud.google.com/tpu/docs/v6e: 32 GB, 918 TFLOP/s, 1,638 GB/s; 800 GB/s both ways over 4 links; 25.6 Tbit/s of
  # network per pod of 256. A dim of 16 wraps.
  "v6e": Chip("tpu", 32 * _GIB, 918e12, 1638e9, 100e9, 12.5e9, torus_dims=2, wrap_size=16),
  # nvidia.com/data-center/h100 (SXM): 80 GB, 989.4 TFLOP/s dense, 3.35 TB/s, NVLink 900 GB/s both ways. Network of the
  # DGX H100: one 400 Gbit/s adapter per GPU.
  "h100": Chip("gpu", 80 * 10**9, 989.4e12, 3350e9, 450e9, 50e9, node_size=8),
  # nvidia.com/data-center/h200 (SXM): 141 GB, 989.4 TFLOP/s dense, 4.8 TB/s, NVLink and network as the H100's.
  "h200": Chip("gpu", 141 * 10**9, 989.4e12, 4800e9, 450e9, 50e9, node_size=8),
  # nvidia.com/data-center/dgx-b200: 180 GB, 2.25 PFLOP/s dense, 8 TB/s, NVLink 1.8 TB/s both ways, 400 Gbit/s per GPU.
  "b200": Chip("gpu", 180 * 10**9, 2250e12, 8000e9, 900e9, 50e9, node_size=8),
  # Two cores of a server CPU with matrix units, measured: 16 GB to each virtual device is an assumption.
  "cpu": Chip("cpu", 16 * _GIB, 1.3e12, 33e9, 33e9, 33e9, node_size=1 << 20),
}

# What JAX calls the devices; a longer name comes before its beginning.
_KINDS = {
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5p": "v5p",
  "TPU v5": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "NVIDIA H100": "h100",
  "NVIDIA H200": "h200",
  "NVIDIA B200": "b200",
}


def chip_of(device_kind: str) -> Chip | None:
  """Returns the numbers of a device by what JAX calls it; None where they are not known, as of a CPU."""
  for beginning, kind in _KINDS.items():
    if device_kind.startswith(beginning):
      return CHIPS[kind]
  return None


def peak_flops() -> float | None:
  """Returns the dense bfloat16 peak of one device of this process, None where it is not known."""
  chip = chip_of(jax.local_devices()[0].device_kind)
  return None if chip is None else chip.peak_flops
