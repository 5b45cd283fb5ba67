#!/usr/bin/env bash
# Trains on this machine, or on several machines without a scheduler. The same command resumes a run
# that was stopped. Ctrl-C saves a checkpoint and stops; torchrun then prints a traceback of its own
# and exits with code 1. (On one machine, `resnet-dist train --ranks N` ends without one.)
#
#   launch/torchrun.sh configs/imagenet/resnet50.yaml name=first train.epochs=50
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh CONFIG.yaml     # on 10.0.0.1
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 launch/torchrun.sh CONFIG.yaml     # on the other
#
# NPROC_PER_NODE  ranks per node (default: one per visible GPU, or 2 if there is no GPU)
# NNODES          number of nodes (default: 1)
# NODE_RANK       number of this node, from 0; needed with several nodes
# MASTER_ADDR     address of node 0; needed with several nodes
# MASTER_PORT     free port of node 0 (default: 29500)
# PYTHON          the interpreter (default: .venv/bin/python of the checkout if there, else python3)
set -euo pipefail

[[ $# -gt 0 ]] || { echo "usage: $0 CONFIG.yaml [key.sub=value ...]" >&2; exit 2; }
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The checkout need not be installed, and need not be the working directory.
export PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x $repo/.venv/bin/python ]] && PYTHON=$repo/.venv/bin/python
fi

nodes=${NNODES:-1}
ranks=${NPROC_PER_NODE:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')}
# The ranks share the cores. Without this setting, each rank would start one thread per core.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

# Seconds that the ranks have to save after Ctrl-C or TERM before torchrun kills them.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

# Checks the config first, so that a mistake gives one line and exit code 2 instead of a traceback
# per rank.
"$PYTHON" -m resnet_dist train "$@" --dry-run --world-size "$((nodes * ranks))" >/dev/null

if [[ $nodes == 1 ]]; then
  rendezvous=(--standalone) # uses a free port, so that several runs can share this machine
else
  : "${MASTER_ADDR:?must be an address of node 0 that every node can reach}"
  : "${NODE_RANK:?must be 0 on the node of MASTER_ADDR, and 1, 2, ... on the others}"
  # is_host is set explicitly. torchrun would guess it from the host name, which may not resolve to
  # MASTER_ADDR.
  rendezvous=(
    --nnodes="$nodes" --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-29500}"
    --rdzv-conf="is_host=$((NODE_RANK == 0))"
  )
  [[ $NODE_RANK == 0 ]] && rendezvous+=(--local-addr="$MASTER_ADDR")
  # As in slurm/resnet50.sh: without this the ranks do not find each other after a restart.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node="$ranks" \
  -m resnet_dist train "$@"
