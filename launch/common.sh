# shellcheck shell=bash
# What the scripts beside it share: help, errors in one line, dry runs, bounded retries and the command after `--`.

set -euo pipefail
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "${0##*/}: error: bash $BASH_VERSION is too old: 4.4 or newer is needed" >&2; exit 2; }

DRY_RUN=${DRY_RUN:-}
TRIES=${TRIES:-5}                  # of what is known to be flaky; nothing is tried for ever
RETRY_SECONDS=${RETRY_SECONDS:-10} # before the second try; each later wait is as much longer

say() { echo "${0##*/}: $*" >&2; }

# A mistake in how the script was called ends with 2, what went wrong elsewhere with 1.
die() { say "error: $*"; exit 2; }
fail() { say "error: $*"; exit 1; }

# The comment at the head of a script is its help.
usage() { sed -n '2,/^[^#]*$/s/^#\( \|$\)//p' "$0"; }

need() { [[ $DRY_RUN ]] || command -v "$1" > /dev/null || fail "$1 is not on the PATH: $2"; }

# Words as a shell reads them back; only those that need it are quoted.
quote() {
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

# Runs a command that changes something, or with --dry-run prints it.
run() { if [[ $DRY_RUN ]]; then quote "$@"; else "$@"; fi; }

# retry WHAT COMMAND…: up to $TRIES times, with growing waits.
retry() {
  local what=$1 try
  shift
  for ((try = 1; ; try++)); do
    "$@" && return
    ((try < TRIES)) || fail "$what failed $TRIES times; the messages above say why"
    say "$what failed, try $try of $TRIES; next in $((RETRY_SECONDS * try)) s"
    sleep $((RETRY_SECONDS * try))
  done
}

whole() { [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1=$2 is not a whole number from 1 up"; }

whole TRIES "$TRIES"
[[ $RETRY_SECONDS =~ ^[0-9]+$ ]] || die "RETRY_SECONDS=$RETRY_SECONDS is not a whole number"

# A secret by which the processes of a run know each other: LCM_JAX_JOB_TOKEN where it is set, else a new one.
job_token() {
  local random
  random=$(od -An -N16 -tx1 /dev/urandom)
  echo "${LCM_JAX_JOB_TOKEN:-${random//[[:space:]]/}}"
}

# take_command WORD…: sets COMMAND, WORKDIR and CACHE from what stands after `--`.
take_command() {
  (($#)) || die "nothing to run: put the command last, as in -- python -m lcm_jax.train --config=configs/sd15.py --workdir=DIR"
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
  [[ $WORKDIR ]] || die "the command names no workdir: add --workdir=DIR"
  # Beside the workdir, so that the next run and each restarted worker find what this one compiled.
  local parent=.
  [[ $WORKDIR != */* ]] || parent=${WORKDIR%/*}
  # shellcheck disable=SC2034  # the scripts use it
  CACHE=${JAX_COMPILATION_CACHE_DIR:-$parent/compile_cache}
}

# A worker's own disk goes with the worker, and no other worker sees it.
need_bucket() {
  [[ $WORKDIR =~ ^gs://[^/]+/. ]] || die "--workdir=$WORKDIR is not in a bucket, which all workers see: --workdir=gs://BUCKET/${WORKDIR##*/}"
}
