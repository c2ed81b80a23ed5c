#!/usr/bin/env bash
# Hands a run to a GKE cluster that xpk has made: TPU slices, queued and started again by the cluster.
#
#   CLUSTER=c ZONE=us-east5 TPU=v5p-128 IMAGE=REGISTRY/ultrathink:tpu NAME=ultra13b \
#     launch/xpk.sh [--dry-run] --config=configs/ultra13b.py --workdir=/mnt/shared/ultra13b
#
# /mnt/shared is what `xpk storage attach --auto-mount=true --mount-point=/mnt/shared` gives every workload.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/settings.sh

dry_run=
if [[ "${1:-}" == --dry-run ]]; then
  dry_run=1
  shift
fi
need CLUSTER "the cluster that xpk made"
need ZONE "where it is"
need TPU "the kind and size of a slice, as v5p-128"
need IMAGE "what launch/Dockerfile builds with --target=tpu"
need NAME "what the workload is called"
run xpk workload create --workload="$NAME" --cluster="$CLUSTER" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} \
  --tpu-type="$TPU" --num-slices="${SLICES:-1}" --max-restarts="${RESTARTS:-50}" --docker-image="$IMAGE" \
  --command="python -m ultrathink_jax.main $(quoted "$@")"
