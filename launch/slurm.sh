#!/usr/bin/env bash
# Training on GPU nodes under SLURM. Outside a job it submits one; inside a job (salloc, or the one it submitted) it
# starts a process for each GPU. JAX finds its coordinator and its processes in SLURM's variables.
#
#   launch/slurm.sh --nodes=N --gpus=G [OPTIONS] -- python -m lcm_jax.train --config=… --workdir=…
#
#   --nodes=N             nodes
#   --gpus=G              GPUs of each node
#   --time=24:00:00       time limit; the training saves before it ends and is queued again
#   --partition=, --account=, --qos=, --cpus-per-task=, --job-name=   as sbatch has them
#   --max-restarts=20     how often it is started or queued again
#   --dry-run             prints the sbatch or srun command instead of running it
#   --help
#
# Call it from the checkout, with the virtual environment active; the workdir must be on a disk that all nodes see.
# JAX_COMPILATION_CACHE_DIR (the workdir's neighbour compile_cache otherwise), XLA_FLAGS and JAX_COORDINATOR_PORT can be set
# in the environment.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$HERE/common.sh"
# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$HERE/flags.sh"

SAVE_SECONDS=180 # SIGTERM comes that long before the time limit, for a last checkpoint
NODES="" GPUS="" MAX_RESTARTS=20 OPTIONS=(--time=24:00:00 --job-name=lcm_jax) COMMAND=()

main() {
  parse "$@"
  if [[ ${SLURM_JOB_ID:-} ]]; then start; else submit; fi
}

parse() {
  while (($#)); do
    case $1 in
      --help | -h) usage; exit ;;
      --dry-run) DRY_RUN=1 ;;
      --nodes=*) NODES=${1#*=}; whole --nodes "$NODES" ;;
      --gpus=*) GPUS=${1#*=}; whole --gpus "$GPUS" ;;
      --max-restarts=*) MAX_RESTARTS=${1#*=}; whole --max-restarts "$MAX_RESTARTS" ;;
      --time=* | --partition=* | --account=* | --qos=* | --cpus-per-task=* | --job-name=*) OPTIONS+=("$1") ;;
      --) shift; break ;;
      *) die "there is no option $1; --help lists them (values follow a =, the training command follows --)" ;;
    esac
    shift
  done
  [[ $NODES ]] || die "--nodes is missing: how many nodes, as in --nodes=2"
  [[ $GPUS ]] || die "--gpus is missing: how many GPUs a node has, as in --gpus=8"
  take_command "$@"
}

submit() {
  need sbatch "is this a login node of a SLURM cluster?"
  # --wrap, since sbatch would run a copy of this script, far from the files beside it. The signal goes to the
  # processes and not to this script, which then queues the job again. --requeue: SLURM does it after a preemption.
  run sbatch --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" "${OPTIONS[@]}" \
    --requeue --signal="TERM@$SAVE_SECONDS" --open-mode=append --output=%x-%j.log \
    --wrap="exec $(quote "$HERE/slurm.sh" --nodes="$NODES" --gpus="$GPUS" --max-restarts="$MAX_RESTARTS" -- "${COMMAND[@]}")" \
    || fail "sbatch refused the job; its message is above"
}

start() {
  need srun "is this a node of a SLURM cluster?"
  # JAX_COORDINATOR_PORT is left to JAX where it is not set: it takes one from the job's number, so that two jobs on a
  # node get different ones.
  local environment=("JAX_PLATFORMS=cuda,cpu" "JAX_COMPILATION_CACHE_DIR=$CACHE" "XLA_FLAGS=$(gpu_flags)")
  # A task for each GPU, since JAX gives each task the GPU of its number on the node; and all GPUs visible to each task
  # (no --gpus-per-task, no binding), since it counts among those. --kill-on-bad-exit: without one process the others
  # only wait.
  local task=(srun --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" --gpu-bind=none
    --kill-on-bad-exit=1 --label env "${environment[@]}" "${COMMAND[@]}")
  [[ ! $DRY_RUN ]] || { quote "${task[@]}"; return; }
  # Exported, not a word of the command, which everyone on the node can read.
  LCM_JAX_JOB_TOKEN=$(job_token)
  export LCM_JAX_JOB_TOKEN
  local code restarts=${SLURM_RESTART_COUNT:-0}
  while :; do
    code=0
    "${task[@]}" || code=$?
    case $code in
      0) say "the training is done"; return ;;
      2) fail "the training refused its command (above); starting it again would not help" ;;
    esac
    ((restarts++ < MAX_RESTARTS)) || fail "the training ended with $code and was started $MAX_RESTARTS times again before; no more"
    if ((code == 143)); then # it has saved: the time is up
      say "queued again, to go on from the checkpoint"
      exec scontrol requeue "$SLURM_JOB_ID"
    fi
    say "the training ended with $code; start $restarts of at most $MAX_RESTARTS more"
    sleep "$RETRY_SECONDS"
  done
}

main "$@"
