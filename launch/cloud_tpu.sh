#!/usr/bin/env bash
# A Cloud TPU slice from creation to removal; every worker of it runs the same command and finds the others by itself.
#
#   NAME=pod ZONE=us-east5-a ACCELERATOR=v5p-128 SHARED=10.0.0.2:/share launch/cloud_tpu.sh [--dry-run] STEP
#
#   create    asks for the slice; SPOT=1 for a preemptible one
#   status    says whether it is there
#   install   copies this checkout to every worker, and mounts SHARED (NFS, as Filestore's) at /mnt/shared
#   train     starts on every worker: ... train -- --config=configs/ultra13b.py --workdir=/mnt/shared/ultra13b
#   logs      follows the first worker
#   stop      ends the run on every worker
#   delete    gives the slice back
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/settings.sh

dry_run=
if [[ "${1:-}" == --dry-run ]]; then
  dry_run=1
  shift
fi
step=${1:-}
need NAME "what the slice is called"
need ZONE "where it is, as us-east5-a"
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
python=ultrathink_jax/.venv/bin/python

on_workers() { # WORKERS COMMAND
  run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" --command="$2"
}

case "$step" in
  create)
    need ACCELERATOR "the kind and size, as v5litepod-16, v5p-128 or v6e-256"
    case "$ACCELERATOR" in
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      *) need RUNTIME "the runtime version of $ACCELERATOR" ;;
    esac
    run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${where[@]}" \
      --accelerator-type="$ACCELERATOR" --runtime-version="${RUNTIME:-$runtime}" ${SPOT:+--spot}
    ;;
  status)
    run gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)'
    ;;
  install)
    need SHARED "an NFS share that all workers mount, as 10.0.0.2:/share"
    archive=$(mktemp -u --suffix=.tar.gz)
    run git archive --format=tar.gz --output="$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$NAME:ultrathink_jax.tar.gz" "${where[@]}" --worker=all
    on_workers all "set -e; sudo apt-get -qq update; sudo apt-get -qq install -y nfs-common python3.11-venv; \
mkdir -p ultrathink_jax; tar -xzf ultrathink_jax.tar.gz -C ultrathink_jax; \
sudo mkdir -p /mnt/shared; mountpoint -q /mnt/shared || sudo mount -t nfs $SHARED /mnt/shared; \
python3.11 -m venv ultrathink_jax/.venv; $python -m pip install -q -e 'ultrathink_jax[tpu]'"
    ;;
  train)
    shift
    [[ "${1:-}" == -- ]] && shift
    if [[ $# == 0 ]]; then
      echo "error: nothing to run; write train -- --config=configs/NAME.py --workdir=/mnt/shared/NAME" >&2
      exit 2
    fi
    on_workers all "cd ultrathink_jax; nohup .venv/bin/python -m ultrathink_jax.main $(quoted "$@") >> ~/run.log 2>&1 &"
    ;;
  logs) on_workers 0 "tail -n 100 -F run.log" ;;
  stop) on_workers all "pkill -INT -f '[u]ltrathink_jax.main'" ;;
  delete) run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet ;;
  *)
    echo "error: ${step:-no step} is not one of create, status, install, train, logs, stop, delete" >&2
    exit 2
    ;;
esac
