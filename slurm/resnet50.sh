#!/usr/bin/env bash
# Trains on a Slurm cluster: one torchrun per node, one rank per GPU. A job that is preempted, or
# reaches its time limit, saves a checkpoint, queues itself again and goes on from that step.
#
#   sbatch slurm/resnet50.sh
#   sbatch --nodes=4 --time=8:00:00 slurm/resnet50.sh name=lr02 optim.base_lr=0.2
#   CONFIG=configs/imagenet/resnet101.yaml sbatch slurm/resnet50.sh
#   CONFIG=configs/quickstart.yaml NPROC_PER_NODE=2 sbatch --gres=none slurm/resnet50.sh    # CPUs
#
# CONFIG          the config; the arguments are overrides on top of it
# NPROC_PER_NODE  ranks per node, if not one per GPU that Slurm gives
# PYTHON          the interpreter, if not .venv/bin/python of the checkout or python3
# MAX_RESTARTS    times that torchrun starts the ranks anew in place after one has crashed (3)
#
# The lines below fit two nodes of 8 GPUs; each can be given to sbatch instead.
#SBATCH --job-name=resnet-dist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
# A requeued job goes on in the same log.
#SBATCH --open-mode=append
#SBATCH --requeue
# USR1 to this shell (B:), not to the ranks, 120 s before the time limit; and ahead of a preemption
# where the cluster sets SlurmctldParameters=preempt_send_user_signal.
#SBATCH --signal=B:USR1@120
set -euo pipefail

[[ -n ${SLURM_JOB_ID:-} ]] || { echo "this is a batch script: sbatch $0" >&2; exit 2; }
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date)"

# --------------------------------------------------------------------------------------------------
# Being told to stop

# Set before anything that takes time: an unhandled USR1 would end this shell, and with it the job.
# The request is passed on at once, to the steps (scancel leaves this shell out), and then again: a
# rank that is still importing has no handler yet, and ignores it.
srun='' reminder=''
stop_requested=false
on_stop() {
  stop_requested=true
  [[ -n $srun && -z $reminder ]] || return 0
  scancel --signal=USR1 "$SLURM_JOB_ID" || true
  remind & reminder=$!
}
remind() { while sleep 10; do scancel --signal=USR1 "$SLURM_JOB_ID" || true; done; }
trap on_stop USR1
# TERM comes with a KILL behind it (scancel, a requeue, a preemption whose grace is over), and Slurm
# sends it to the ranks too: they save. This shell only waits for them; what happens to the job then
# is Slurm's decision. To queue it again here would undo a user's scancel.
trap ':' TERM

# --------------------------------------------------------------------------------------------------
# Where things are

# sbatch runs a copy of this script from its spool, so BASH_SOURCE is no use here; Slurm remembers
# the original. Relative paths (data.root, tracking.run_root) are relative to the checkout.
here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')
repo=$(dirname "$(dirname "$here")")
[[ -d $repo/resnet_dist ]] || repo=$SLURM_SUBMIT_DIR
[[ -d $repo/resnet_dist ]] || { echo "no checkout at $repo: sbatch from one" >&2; exit 2; }
config=${CONFIG:-configs/imagenet/resnet50.yaml}
[[ $config != /* && -f $SLURM_SUBMIT_DIR/$config ]] && config=$SLURM_SUBMIT_DIR/$config
cd "$repo"

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=$PWD/.venv/bin/python
fi
ranks_per_node=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

# --------------------------------------------------------------------------------------------------
# Preflight: a mistake in the config costs one line and exit code 2, not a traceback per node

"$PYTHON" -m resnet_dist train "$config" "$@" --dry-run \
  --world-size "$((SLURM_JOB_NUM_NODES * ranks_per_node))"
echo

# --------------------------------------------------------------------------------------------------
# One torchrun per node

# Addresses, not names: a node's name need not resolve, and a host may think itself to be another.
addresses=()
for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
  addresses+=("$(scontrol show node "$node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')")
done
export NODE_ADDRESSES="${addresses[*]}"
export MASTER_ADDR=${addresses[0]}
# One port per job and start, below the range from which the kernel takes ephemeral ports (32768):
# two jobs may share a host, and a rank of a lost start may linger on it.
export MASTER_PORT=$((20000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 12000))
export RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
# srun passes it on, and rank 0 signs outcome.json with it: an earlier start's ending is not ours.
export RESNET_DIST_START=$RDZV_ID
export RANKS_PER_NODE=$ranks_per_node MAX_RESTARTS=${MAX_RESTARTS:-3} PYTHON
cpus=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > ranks_per_node ? cpus / ranks_per_node : 1))}
# After a restart the ranks meet anew; through the store that torchrun shares by default they would
# look for each other at the addresses of the dead (seen with torch 2.13 and gloo).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# c10d and not static: with c10d a node whose rank has died calls the others to a new rendezvous;
# with static they learn of it only by their own ranks' failure, each spending a restart of its own.
# is_host is said, not guessed: where two nodes share a host (a test) both would take the port.
# USR1 and USR2 are ignored before exec, which keeps that: torchrun's agent would die of them, while
# the ranks install handlers of their own.
# shellcheck disable=SC2016
on_each_node='
  trap "" USR1 USR2
  addresses=($NODE_ADDRESSES)
  exec "$PYTHON" -m torch.distributed.run \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" \
    --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="$RDZV_ID" \
    --rdzv-conf="is_host=$((SLURM_NODEID == 0))" --local-addr="${addresses[$SLURM_NODEID]}" \
    --max-restarts="$MAX_RESTARTS" \
    -m resnet_dist train "$@"'

requeue() {
  echo "told to stop: job $SLURM_JOB_ID goes back to the queue, $(date)"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}

"$stop_requested" && requeue # told before there was anything to stop

# In the background, as bash runs a trap only between foreground commands. Since Slurm 22.05 srun
# does not take --cpus-per-task from sbatch. One node's failure ends the others'.
srun --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=1 \
  bash -c "$on_each_node" torchrun "$config" "$@" &
srun=$!
"$stop_requested" && [[ -z $reminder ]] && { remind & reminder=$!; } # told in between
# `wait` returns at a signal too, so it is asked again until srun is gone; then it has its status.
while kill -0 "$srun" 2>/dev/null; do wait "$srun" || true; done
status=0
wait "$srun" || status=$?
[[ -z $reminder ]] || kill "$reminder" 2>/dev/null || true

# What the run itself says of this start. srun's code tells less: a rank that has stopped on request
# exits with 0, as one that has finished does, and torchrun makes 1 of every other code.
ending=0
"$PYTHON" -m resnet_dist status "$config" "$@" --start "$RESNET_DIST_START" --exit-code || ending=$?
case $ending in
  0) echo "job $SLURM_JOB_ID is done, $(date)" ;;
  75)
    "$stop_requested" && requeue
    echo "job $SLURM_JOB_ID was stopped by a scancel or a preemption, $(date)"
    exit 75
    ;;
  2) exit 2 ;; # rank 0 has said in one line what to mend
  *)
    [[ $status != 0 ]] || status=1
    echo "job $SLURM_JOB_ID failed with exit code $status, $(date)" >&2
    exit "$status"
    ;;
esac
