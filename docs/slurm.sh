#!/usr/bin/env bash
# Pretraining on several hosts under SLURM: set the lines marked with <--, then `sbatch docs/slurm.sh`.
#
# Shortly before its time limit the run writes a checkpoint and the job is queued again, until the run is finished.
# The checkout, the data and the run's folder lie on a file system that all hosts share; relative paths begin where
# sbatch was called.
#SBATCH --job-name=simclr
#SBATCH --nodes=2                 # <--
#SBATCH --ntasks-per-node=1       # a torchrun on each host, which starts a process for each GPU
#SBATCH --gpus-per-node=8         # <--
#SBATCH --cpus-per-task=96        # <-- all cores of a host: they decode the images
#SBATCH --mem=0                   # all memory of a host
#SBATCH --time=24:00:00           # <--
#SBATCH --signal=B:USR1@180       # to this script, 3 minutes before the time limit
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

export PATH="${VENV:-$PWD/.venv}/bin:$PATH" # <-- where torchrun is; several networks: also NCCL_SOCKET_IFNAME
run=${RUN:-runs/imagenet}         # <-- the run's folder
gpus=${GPUS_PER_NODE:-8}          # <-- as above: processes of a host (on CPUs, with --gpus 0 among the flags)
train=(--data "${DATA:-/data/imagenet}" --preset imagenet --out "$run" "$@") # <--

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120 # seconds for the checkpoint; in torch 2.11 it is 30, whatever is set
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else processes that start again may find addresses of the ones before
case " ${train[*]} " in
    *" --resume never "* | *" --resume=never "*)
        echo "error: each start of this job would begin again: delete $run instead of giving --resume never" >&2
        exit 2
        ;;
esac
stopping= step= status=1
stop() {
    stopping=${stopping:-$1}
    [ -z "$step" ] || kill -USR1 "$step" 2> /dev/null
}
trap 'stop "the time limit"' USR1
trap 'stop "a cancel or a preemption"' TERM # SLURM itself queues a preempted job again, where it is set up so
last() { stat -c %y "$run/checkpoints/last.pt" 2> /dev/null; } # the file server's clock alone
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
begun=$(last)
for ((attempt = 0; ; attempt++)); do
    rm -f "$run/requeue" # one of an earlier start says nothing of this one
    before=$(last)
    [ -z "$stopping" ] || break
    # srun passes the signal on to every torchrun, and that to its processes, which agree on the step to stop after.
    srun --kill-on-bad-exit=0 torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$gpus" --max-restarts=3 \
        --rdzv-backend=c10d --rdzv-endpoint="$first:${PORT:-29400}" --rdzv-conf=read_timeout=600 \
        --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$attempt" \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m simclr_fast.train "${train[@]}" &
    step=$!
    wait "$step"
    status=$?
    while kill -0 "$step" 2> /dev/null; do # the signal has ended the wait, not the step
        wait "$step"
        status=$?
    done
    step=
    [ "$status" -ne 0 ] || exit 0
    [ -z "$stopping" ] || break
    # A host or the network has failed for longer than torchrun waits: once more, if the run had got on before and was
    # not stopped from elsewhere.
    [ "$(last)" != "$before" ] && [ ! -e "$run/requeue" ] || exit "$status"
done
echo "stopped by $stopping"
# torchrun's status is 1 for a failure and for a stop with a checkpoint; the marker tells them apart.
if [ "$stopping" = "the time limit" ] && { [ -e "$run/requeue" ] || [ "$(last)" != "$begun" ]; }; then
    echo "the job is queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit
fi
exit "$status"
