#!/usr/bin/env bash
# Trains on this machine, or on several without a scheduler. The same command again goes on where
# it stopped; Ctrl-C saves first (torchrun then ends with a traceback of its own, and code 1).
#
#   launch/torchrun.sh configs/imagenet/resnet50.yaml name=first train.epochs=50
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh CONFIG.yaml     # on 10.0.0.1
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 launch/torchrun.sh CONFIG.yaml     # on the other
#
# NPROC_PER_NODE  ranks per node: the GPUs seen, or 2 where there is none
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT    one node; 0; the address of node 0; 29500
# PYTHON          the interpreter, if not .venv/bin/python of the checkout or python3
set -euo pipefail

[[ $# -gt 0 ]] || { echo "usage: $0 CONFIG.yaml [key.sub=value ...]" >&2; exit 2; }
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The checkout need not be installed, nor be the working directory.
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x $repo/.venv/bin/python ]] && PYTHON=$repo/.venv/bin/python
fi

nodes=${NNODES:-1}
ranks=${NPROC_PER_NODE:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')}
# The ranks share the cores; without a number each would start a thread per core.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

# Time for the ranks to save after Ctrl-C or TERM, before torchrun kills them.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

# A mistake in the config costs one line and exit code 2, not a traceback per rank.
"$PYTHON" -m resnet_dist train "$@" --dry-run --world-size "$((nodes * ranks))" >/dev/null

if [[ $nodes == 1 ]]; then
  rendezvous=(--standalone) # a free port; other runs on this machine do no harm
else
  : "${MASTER_ADDR:?must be an address of node 0 that every node reaches}"
  : "${NODE_RANK:?must be 0 on the node of MASTER_ADDR, then 1, 2, ...}"
  # is_host is said, not guessed from the host's name, which may not resolve to MASTER_ADDR.
  rendezvous=(
    --nnodes="$nodes" --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}"
    --rdzv-conf="is_host=$((NODE_RANK == 0))"
  )
  [[ $NODE_RANK == 0 ]] && rendezvous+=(--local-addr="$MASTER_ADDR")
  # As in slurm/resnet50.sh: else the ranks do not find each other after a restart.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node="$ranks" \
  -m resnet_dist train "$@"
