#!/usr/bin/env bash
# Training on the GPUs of one machine: one process drives them all.
#
#   launch/gpus.sh [OPTIONS] -- python -m lcm_jax.train --config=… --workdir=…
#
#   --gpus=0,1     only these GPUs (default: all)
#   --dry-run      prints the command with its environment instead of running it
#   --help
#
# Machines without a scheduler: run it on each, with --coordinator=HOST:8476 --num-processes=N --process-id=I added to
# the training's own options, HOST being the machine with I = 0, and with the same secret as LCM_JAX_JOB_TOKEN in the
# environment of each. JAX_COMPILATION_CACHE_DIR (default: compile_cache beside the workdir) and XLA_FLAGS can also be
# set there.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$HERE/common.sh"
# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$HERE/flags.sh"

GPUS="" COMMAND=()

main() {
  parse "$@"
  need nvidia-smi "is NVIDIA's driver installed?"
  [[ $DRY_RUN ]] || check_gpus
  # JAX_PLATFORMS: without it a machine whose driver does not start would train on its CPU.
  local environment=("JAX_PLATFORMS=cuda,cpu" "JAX_COMPILATION_CACHE_DIR=$CACHE" "XLA_FLAGS=$(gpu_flags)")
  [[ ! $GPUS ]] || environment+=("CUDA_VISIBLE_DEVICES=$GPUS")
  if [[ $DRY_RUN ]]; then quote env "${environment[@]}" "${COMMAND[@]}"; else exec env "${environment[@]}" "${COMMAND[@]}"; fi
}

parse() {
  while (($#)); do
    case $1 in
      --help | -h) usage; exit ;;
      --dry-run) DRY_RUN=1 ;;
      --gpus=*) GPUS=${1#*=} ;;
      --) shift; break ;;
      *) die "there is no option $1; --help lists them (values follow a =, the training command follows --)" ;;
    esac
    shift
  done
  take_command "$@"
  [[ ! $GPUS || $GPUS =~ ^[0-9]+(,[0-9]+)*$ ]] || die "--gpus=$GPUS must be numbers separated by commas, as in --gpus=0,1"
}

check_gpus() {
  local there gpu
  there=$(nvidia-smi --query-gpu=index --format=csv,noheader) || fail "nvidia-smi finds no working GPU; its message is above"
  for gpu in ${GPUS//,/ }; do
    grep -qx "$gpu" <<< "$there" || die "--gpus=$GPUS: there is no GPU $gpu on this machine, only ${there//$'\n'/, }"
  done
}

main "$@"
