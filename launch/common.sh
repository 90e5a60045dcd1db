# shellcheck shell=bash
# Shared by the launch scripts: help, one-line errors, dry runs, bounded retries, and the command after `--`.

set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "${0##*/}: error: bash $BASH_VERSION is too old: 4.4 or newer is needed" >&2; exit 2; }

DRY_RUN=${DRY_RUN:-}
TRIES=${TRIES:-5}                  # attempts of flaky steps
RETRY_SECONDS=${RETRY_SECONDS:-10} # before the second attempt; each later wait is longer by as much

say() { echo "${0##*/}: $*" >&2; }

# Exit codes: 2 for a wrong call of the script, 1 for other errors.
die() { say "error: $*"; exit 2; }
fail() { say "error: $*"; exit 1; }

# Prints the comment at the head of the script, which is its help.
usage() { sed -n '2,/^[^#]*$/s/^#\( \|$\)//p' "$0"; }

need() { [[ $DRY_RUN ]] || command -v "$1" > /dev/null || fail "$1 is not on the PATH: $2"; }

# Prints words so that a shell can read them back; quotes only those that need it.
quote() {
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

# Runs a command that has effects; with --dry-run, prints it instead.
run() { if [[ $DRY_RUN ]]; then quote "$@"; else "$@"; fi; }

# retry WHAT COMMAND…: up to $TRIES times, with growing waits.
retry() {
  local what=$1 try
  shift
  for ((try = 1; ; try++)); do
    "$@" && return
    ((try < TRIES)) || fail "$what failed $TRIES times; the messages above say why"
    say "$what failed, attempt $try of $TRIES; next in $((RETRY_SECONDS * try)) s"
    sleep $((RETRY_SECONDS * try))
  done
}

whole() { [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1=$2 must be a whole number of at least 1"; }

whole TRIES "$TRIES"
[[ $RETRY_SECONDS =~ ^[0-9]+$ ]] || die "RETRY_SECONDS=$RETRY_SECONDS is not a whole number"

# Prints the secret by which the processes of a run recognize each other: LCM_JAX_JOB_TOKEN if set, else a new one.
job_token() {
  local random
  random=$(od -An -N16 -tx1 /dev/urandom)
  echo "${LCM_JAX_JOB_TOKEN:-${random//[[:space:]]/}}"
}

# take_command WORD…: sets COMMAND, WORKDIR and CACHE from the words after `--`.
take_command() {
  (($#)) || die "no command to run: put it last, as in -- python -m lcm_jax.train --config=configs/sd15.py --workdir=DIR"
  COMMAND=("$@")
  [[ $1 != -* ]] || COMMAND=(python -m lcm_jax.train "$@")
  WORKDIR=
  local i
  for i in "${!COMMAND[@]}"; do
    case ${COMMAND[i]} in
      --workdir=*) WORKDIR=${COMMAND[i]#*=} ;;
      --workdir) WORKDIR=${COMMAND[i + 1]:-} ;;
    esac
  done
  WORKDIR=${WORKDIR%/}
  [[ $WORKDIR ]] || die "the command has no workdir: add --workdir=DIR"
  # Beside the workdir, so that later runs and restarted workers find the compiled programs.
  local parent=.
  [[ $WORKDIR != */* ]] || parent=${WORKDIR%/*}
  # shellcheck disable=SC2034  # the scripts use it
  CACHE=${JAX_COMPILATION_CACHE_DIR:-$parent/compile_cache}
}

# A worker's local disk is deleted with the worker, and other workers can't read it.
need_bucket() {
  [[ $WORKDIR =~ ^gs://[^/]+/. ]] || die "--workdir=$WORKDIR must be in a bucket, which all workers can read: --workdir=gs://BUCKET/${WORKDIR##*/}"
}
