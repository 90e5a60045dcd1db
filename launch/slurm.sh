#!/usr/bin/env bash
# Training on GPU nodes under SLURM. Outside a job it submits one; inside a job (from salloc or from this script) it
# starts one process per GPU. JAX reads its coordinator and processes from SLURM's variables.
#
#   launch/slurm.sh --nodes=N --gpus=G [OPTIONS] -- python -m lcm_jax.train --config=… --workdir=…
#
#   --nodes=N             number of nodes
#   --gpus=G              GPUs per node
#   --time=24:00:00       time limit; the training saves before it and is requeued
#   --partition=, --account=, --qos=, --cpus-per-task=, --job-name=   as for sbatch
#   --max-restarts=20     maximum number of restarts and requeues
#   --dry-run             prints the sbatch or srun command instead of running it
#   --help
#
# Call it from the checkout, with the virtual environment active; the workdir must be on a disk that all nodes share.
# JAX_COMPILATION_CACHE_DIR (default: compile_cache beside the workdir), XLA_FLAGS and JAX_COORDINATOR_PORT can be set in
# the environment.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$HERE/common.sh"
# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$HERE/flags.sh"

SAVE_SECONDS=180 # between SIGTERM and the time limit, for a last checkpoint
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
  [[ $NODES ]] || die "--nodes is missing: the number of nodes, as in --nodes=2"
  [[ $GPUS ]] || die "--gpus is missing: the number of GPUs per node, as in --gpus=8"
  take_command "$@"
}

submit() {
  need sbatch "is this a login node of a SLURM cluster?"
  # --wrap, since sbatch would run a copy of this script, without the files beside it. The signal goes to the
  # processes, not to this script, which then requeues the job. --requeue: SLURM requeues it after a preemption.
  run sbatch --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" "${OPTIONS[@]}" \
    --requeue --signal="TERM@$SAVE_SECONDS" --open-mode=append --output=%x-%j.log \
    --wrap="exec $(quote "$HERE/slurm.sh" --nodes="$NODES" --gpus="$GPUS" --max-restarts="$MAX_RESTARTS" -- "${COMMAND[@]}")" \
    || fail "sbatch refused the job; its message is above"
}

start() {
  need srun "is this a node of a SLURM cluster?"
  # If JAX_COORDINATOR_PORT is not set, JAX derives it from the job's number, so that two jobs on a node get different
  # ports.
  local environment=("JAX_PLATFORMS=cuda,cpu" "JAX_COMPILATION_CACHE_DIR=$CACHE" "XLA_FLAGS=$(gpu_flags)")
  # One task per GPU, since JAX gives each task the GPU with its local number. All GPUs are visible to each task (no
  # --gpus-per-task, no binding), since that number counts all of them. --kill-on-bad-exit: if one process is lost, the
  # others would only wait.
  local task=(srun --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" --gpu-bind=none
    --kill-on-bad-exit=1 --label env "${environment[@]}" "${COMMAND[@]}")
  [[ ! $DRY_RUN ]] || { quote "${task[@]}"; return; }
  # Exported, not passed in the command line, which everyone on the node can read.
  LCM_JAX_JOB_TOKEN=$(job_token)
  export LCM_JAX_JOB_TOKEN
  local code restarts=${SLURM_RESTART_COUNT:-0}
  while :; do
    code=0
    "${task[@]}" || code=$?
    case $code in
      0) say "the training is done"; return ;;
      2) fail "the training refused its command (see above); a restart would not help" ;;
    esac
    ((restarts++ < MAX_RESTARTS)) || fail "the training ended with $code, after $MAX_RESTARTS restarts already; giving up"
    if ((code == 143)); then # it has saved before the time limit
      say "requeued; it will resume from the checkpoint"
      exec scontrol requeue "$SLURM_JOB_ID"
    fi
    say "the training ended with $code; restart $restarts of at most $MAX_RESTARTS"
    sleep "$RETRY_SECONDS"
  done
}

main "$@"
