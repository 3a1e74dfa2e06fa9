#!/bin/sh
# Training across machines without a batch queue: run this on every one of them, with its number.
#
#   MASTER_ADDR=node0 NODE=0 NODES=2 GPUS=8 scripts/multi_node.sh train-unet unet/sd15 --out /scratch/sd15
#
# The run folder must lie on a file system that all machines share.
set -eu
: "${MASTER_ADDR:?the name or address of machine 0}" "${NODE:?the number of this machine, from 0}" "${NODES:?how many}"

exec torchrun --nnodes="$NODES" --node-rank="$NODE" --nproc-per-node="${GPUS:-1}" --max-restarts=0 \
  --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" -m ldm_cli "$@"
