#!/usr/bin/env bash
# Trains on a Slurm cluster: one torchrun per node, one rank per GPU. A job that is preempted or
# reaches its time limit saves a checkpoint, requeues itself and resumes at that step.
#
#   sbatch slurm/resnet50.sh
#   sbatch --nodes=4 --time=8:00:00 slurm/resnet50.sh name=lr02 optim.base_lr=0.2
#   CONFIG=configs/imagenet/resnet101.yaml sbatch slurm/resnet50.sh
#   CONFIG=configs/quickstart.yaml NPROC_PER_NODE=2 sbatch --gres=none slurm/resnet50.sh    # CPUs
#
# CONFIG          the config (default: configs/imagenet/resnet50.yaml); arguments override it
# NPROC_PER_NODE  ranks per node (default: one per GPU that Slurm allocates, or 1 without GPUs)
# PYTHON          the interpreter (default: .venv/bin/python of the checkout if there, else python3)
# MAX_RESTARTS    how often torchrun restarts the ranks within the job after a crash (default: 3)
#
# The options below are for two nodes with 8 GPUs each; options of sbatch override them.
#SBATCH --job-name=resnet-dist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
# A requeued job appends to the same log.
#SBATCH --open-mode=append
#SBATCH --requeue
# Sends USR1 to this shell only (B:), not to the ranks, 120 s before the time limit. It is also sent
# before a preemption if the cluster sets SlurmctldParameters=preempt_send_user_signal.
#SBATCH --signal=B:USR1@120
set -euo pipefail

[[ -n ${SLURM_JOB_ID:-} ]] || { echo "this is a batch script; run: sbatch $0" >&2; exit 2; }
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date)"

# --------------------------------------------------------------------------------------------------
# Stop requests

# The trap is set before anything that takes time, because an unhandled USR1 would end this shell
# and with it the job. The signal is forwarded to the job steps at once (scancel does not send it to
# this shell), and then again every 10 seconds, because a rank that is still importing has no
# handler yet and ignores it.
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
# TERM is followed by KILL (after a scancel, a requeue, or a preemption whose grace period is over).
# Slurm sends it to the ranks too, and they save a checkpoint. This shell only waits for them, and
# Slurm decides what happens to the job. Requeueing it here would undo a user's scancel.
trap ':' TERM

# --------------------------------------------------------------------------------------------------
# Paths

# sbatch runs a copy of this script from its spool folder, so BASH_SOURCE does not help here, but
# Slurm knows the original path. Relative paths (data.root, tracking.run_root) are relative to the
# checkout.
here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')
repo=$(dirname "$(dirname "$here")")
[[ -d $repo/resnet_dist ]] || repo=$SLURM_SUBMIT_DIR
[[ -d $repo/resnet_dist ]] || { echo "no checkout at $repo; run sbatch inside one" >&2; exit 2; }
config=${CONFIG:-configs/imagenet/resnet50.yaml}
[[ $config != /* && -f $SLURM_SUBMIT_DIR/$config ]] && config=$SLURM_SUBMIT_DIR/$config
cd "$repo"

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=$PWD/.venv/bin/python
fi
ranks_per_node=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}

# --------------------------------------------------------------------------------------------------
# Config check: a mistake gives one line and exit code 2 instead of a traceback per node

"$PYTHON" -m resnet_dist train "$config" "$@" --dry-run \
  --world-size "$((SLURM_JOB_NUM_NODES * ranks_per_node))"
echo

# --------------------------------------------------------------------------------------------------
# One torchrun per node

# Uses addresses instead of node names, because a node's name may not resolve, and a host's own name
# may differ from its name in Slurm.
addresses=()
for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
  addresses+=("$(scontrol show node "$node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')")
done
export NODE_ADDRESSES="${addresses[*]}"
export MASTER_ADDR=${addresses[0]}
# Each start of each job has its own port, because two jobs may share a host, and a rank of an
# earlier start may still be running there. The ports are below the range from which the kernel
# takes ephemeral ports (32768 and above).
export MASTER_PORT=$((20000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 12000))
export RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
# srun passes this token on, and rank 0 writes it to outcome.json. An outcome with a different token
# is that of an earlier start.
export RESNET_DIST_START=$RDZV_ID
export RANKS_PER_NODE=$ranks_per_node MAX_RESTARTS=${MAX_RESTARTS:-3} PYTHON
cpus=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > ranks_per_node ? cpus / ranks_per_node : 1))}
# After a restart the ranks connect again. Through the store that torchrun shares by default they
# would use the addresses of the dead ranks (seen with torch 2.13 and gloo).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Uses the c10d rendezvous backend, not static. With c10d, a node whose rank has died calls the
# others to a new rendezvous. With static, the others notice only when their own ranks fail, and
# each uses up a restart of its own. is_host is set explicitly, because torchrun's guess would make
# two nodes on one host (as in a test) both try to open the port. USR1 and USR2 are ignored before
# exec, and stay ignored after it: they would kill torchrun's agent, while the ranks install their
# own handlers.
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
  echo "stopped on request: requeueing job $SLURM_JOB_ID, $(date)"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}

"$stop_requested" && requeue # the signal came before there was anything to stop

# srun runs in the background, because bash runs a trap only after a foreground command has ended.
# Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch. --kill-on-bad-exit ends all
# nodes when one fails.
srun --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=1 \
  bash -c "$on_each_node" torchrun "$config" "$@" &
srun=$!
# The signal may have come before $srun was set.
"$stop_requested" && [[ -z $reminder ]] && { remind & reminder=$!; }
# `wait` also returns on a signal, so it is repeated until srun has ended. A last `wait` then gets
# the exit status.
while kill -0 "$srun" 2>/dev/null; do wait "$srun" || true; done
status=0
wait "$srun" || status=$?
[[ -z $reminder ]] || kill "$reminder" 2>/dev/null || true

# Asks the run for the outcome of this start. srun's exit code says less: a rank that has stopped on
# request exits with 0, just like one that has finished, and torchrun turns any other code into 1.
ending=0
"$PYTHON" -m resnet_dist status "$config" "$@" --start "$RESNET_DIST_START" --exit-code || ending=$?
case $ending in
  0) echo "job $SLURM_JOB_ID is done, $(date)" ;;
  75)
    "$stop_requested" && requeue
    echo "job $SLURM_JOB_ID was stopped by a scancel or a preemption, $(date)"
    exit 75
    ;;
  2) exit 2 ;; # rank 0 has already printed a line that says what to fix
  *)
    [[ $status != 0 ]] || status=1
    echo "job $SLURM_JOB_ID failed with exit code $status, $(date)" >&2
    exit "$status"
    ;;
esac
