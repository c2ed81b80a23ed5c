#!/usr/bin/env bash
# All GPUs of this machine by one process, started again after a preemption.
#
#   launch/gpu_node.sh [--dry-run] --config=configs/ultra3b.py --workdir=runs/ultra3b --config.mesh.fsdp=-1 --config.mesh.data=1
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/settings.sh

dry_run=
if [[ "${1:-}" == --dry-run ]]; then
  dry_run=1
  shift
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92} # of each GPU's memory, for arrays
if [[ -z "$dry_run" ]] && ! command -v nvidia-smi > /dev/null; then
  echo "error: this machine has no nvidia-smi, so no GPU; launch/local.py runs on CPU" >&2
  exit 2
fi
while true; do
  code=0
  run "${PYTHON:-python}" -m ultrathink_jax.main "$@" || code=$?
  [[ $code == 75 ]] || exit "$code"
done
