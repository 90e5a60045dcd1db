#!/usr/bin/env bash
# Training on a Cloud TPU pod (v4, v5e, v5p, v6e), or on several as slices of one run, by queued resources.
#
#   launch/tpu.sh COMMAND NAME --zone=ZONE [OPTIONS] [-- python -m lcm_jax.train --config=… --workdir=gs://…]
#
#   create     requests the pod and waits until it is active
#   install    copies the checkout's last commit to all workers and installs it
#   run        starts the command after -- on all workers; it keeps running when this terminal is closed
#   tail       follows the log of the first worker
#   status     shows the state of the pod, and of the training on each worker
#   stop       sends SIGTERM on all workers: the training saves and ends
#   resume     runs create, install and run as far as needed, then watches: it requests a preempted pod again, and
#              restarts a failed training from its last checkpoint. Ends when the training ends. Use it instead of
#              create, install and run, or after them; it may be interrupted and called again.
#   delete     deletes the pod
#   firewall   lets workers reach each other by tcp in --network ("default" allows it anyway); needs no NAME
#
#   --zone=ZONE           zone of your quota, as in us-east5-a
#   --type=TYPE           product name: v4-64, v5e-64, v5p-128, v6e-64 … (create, resume; in a dry run also install and
#                         run, which otherwise query the pod: the compiler flags depend on it)
#   --slices=1            number of pods of this type in one run (create, resume)
#   --spot                cheaper, but may be preempted at any time
#   --reserved            uses your reservation
#   --network=default     the VPC network
#   --project=PROJECT     default: gcloud's
#   --max-restarts=20     maximum number of restarts by resume
#   --dry-run             prints the commands instead of running them
#   --help
#
# Workers are reached over ssh: run `ssh-add ~/.ssh/google_compute_engine` first, or gcloud asks for the passphrase of
# each. TRIES, RETRY_SECONDS (flaky steps), POLL_SECONDS, WAIT_HOURS (for the pod), COORDINATOR_PORT, LIBTPU_INIT_ARGS
# and JAX_COMPILATION_CACHE_DIR (default: compile_cache beside the workdir) can be set in the environment.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$HERE/common.sh"
# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$HERE/flags.sh"
whole COORDINATOR_PORT "$COORDINATOR_PORT"

POLL_SECONDS=${POLL_SECONDS:-60}
WAIT_HOURS=${WAIT_HOURS:-24}
STOP_SECONDS=${STOP_SECONDS:-300} # limit for a stopped training to save
whole STOP_SECONDS "$STOP_SECONDS"
[[ $WAIT_HOURS =~ ^[0-9]+$ ]] || die "WAIT_HOURS=$WAIT_HOURS is not a whole number"
[[ $POLL_SECONDS =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "POLL_SECONDS=$POLL_SECONDS is not a number"

REFUSED=3 # internal exit code of a refused request; the script itself exits with 1

ACTION="" NAME="" ZONE="" TYPE="" SLICES=1 NETWORK=default MAX_RESTARTS=20 TIER=() PROJECT=() COMMAND=()

main() {
  parse "$@"
  need gcloud "install the Google Cloud CLI, or see --dry-run"
  need_project
  "do_$ACTION"
}

# Fails at once without a project: gcloud would fail at each request, and each would be retried.
need_project() {
  [[ ! $DRY_RUN && ! ${PROJECT[*]} ]] || return 0
  [[ $(gcloud config get-value project 2> /dev/null) =~ ^[^\(] ]] || die "no project is set; add --project=PROJECT, or type: gcloud config set project PROJECT"
}

parse() {
  local actions=" create install run tail status stop resume delete firewall "
  while (($#)); do
    case $1 in
      --help | -h) usage; exit ;;
      --dry-run) DRY_RUN=1 ;;
      --zone=*) ZONE=${1#*=} ;;
      --type=*) TYPE=${1#*=} ;;
      --slices=*) SLICES=${1#*=}; whole --slices "$SLICES" ;;
      --spot | --reserved) TIER+=("$1") ;;
      --network=*) NETWORK=${1#*=} ;;
      --project=*) PROJECT=("$1") ;;
      --max-restarts=*) MAX_RESTARTS=${1#*=}; whole --max-restarts "$MAX_RESTARTS" ;;
      --) shift; take_command "$@"; need_bucket; break ;;
      -*) die "there is no option $1; --help lists them (and values follow a =)" ;;
      *)
        if [[ ! $ACTION ]]; then
          ACTION=$1
          [[ $actions == *" $1 "* ]] || die "there is no command $1; use one of$actions"
        elif [[ ! $NAME ]]; then
          NAME=$1
        else
          die "unexpected argument $1; the training command follows --"
        fi
        ;;
    esac
    shift
  done
  [[ $ACTION ]] || die "a command is missing; use one of$actions"
  [[ $ACTION == firewall && ! $NAME ]] || [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "NAME='$NAME' must be lower-case letters, digits and hyphens, at most 40: launch/tpu.sh $ACTION sd15 …"
  [[ $ZONE || $ACTION == firewall ]] || die "--zone is missing: the zone of your TPU quota, as in --zone=us-east5-a"
  ((${#TIER[@]} < 2)) || die "--spot and --reserved exclude each other"
  [[ ! " run resume " == *" $ACTION "* || ${#COMMAND[@]} -gt 0 ]] || take_command
  [[ ! " create resume " == *" $ACTION "* ]] || read_type
}

# Sets GENERATION, ACCELERATOR (gcloud's name of the type) and RUNTIME (the workers' image).
read_type() {
  [[ $TYPE ]] || die "--type is missing: the pod's product name, as in --type=v5p-16"
  [[ $TYPE =~ ^(v4|v5e|v5litepod|v5p|v6e)-([1-9][0-9]*)$ ]] || die "--type=$TYPE is unknown; use v4-64, v5e-64, v5p-128, v6e-64 or the like"
  GENERATION=${BASH_REMATCH[1]/litepod/e}
  case $GENERATION in
    v4 | v5p) ((BASH_REMATCH[2] % 8 == 0)) || die "--type=$TYPE: $GENERATION counts two cores per chip and four chips per host: $GENERATION-8, -16, -24 …" ;;
    *) [[ " 1 4 8 16 32 64 128 256 " == *" ${BASH_REMATCH[2]} "* ]] || die "--type=$TYPE: $GENERATION has 1, 4, 8, 16, 32, 64, 128 or 256 chips" ;;
  esac
  ACCELERATOR=${TYPE/v5e/v5litepod}
  case $GENERATION in
    v4) RUNTIME=tpu-ubuntu2204-base ;;
    v5e) RUNTIME=v2-alpha-tpuv5-lite ;;
    v5p) RUNTIME=v2-alpha-tpuv5 ;;
    v6e) RUNTIME=v2-alpha-tpuv6e ;;
  esac
}

tpus() { run gcloud compute tpus "$@" --zone="$ZONE" "${PROJECT[@]}"; }

# Prints the request's state, or nothing if there is no such request.
pod_state() {
  [[ ! $DRY_RUN ]] || return 0
  tpus queued-resources list --filter="name~/queuedResources/$NAME\$" --format="value(state.state)"
}

# ---- the pod

do_create() {
  (create) || exit 1
}

create() {
  local state
  state=$(pod_state) || fail "gcloud can't list the requests in $ZONE; its message is above"
  case $state in
    "") ask_for_pod ;;
    SUSPENDING | SUSPENDED | FAILED | DELETING) fail "$NAME is $state: launch/tpu.sh resume $NAME … requests it again, delete drops it" ;;
    *) say "$NAME has already been requested: $state" ;;
  esac
  wait_for_pod || fail "$NAME was not granted; launch/tpu.sh resume $NAME … requests it again"
}

ask_for_pod() {
  local shape=(--node-id="$NAME")
  ((SLICES == 1)) || shape=(--node-count="$SLICES" --node-prefix="$NAME")
  # The scope lets the workers read and write your buckets; the tag is what `firewall` opens ports for.
  tpus queued-resources create "$NAME" "${shape[@]}" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" --network="$NETWORK" --tags=lcm-jax "${TIER[@]}" \
    --scopes=https://www.googleapis.com/auth/cloud-platform \
    || { say "error: $ACCELERATOR was refused in $ZONE (gcloud's message is above): is there quota for it, on-demand or with --spot?"; exit "$REFUSED"; }
}

wait_for_pod() {
  [[ ! $DRY_RUN ]] || return 0
  local state deadline=$((SECONDS + WAIT_HOURS * 3600)) last=
  while :; do
    state=$(pod_state) || state=unknown # a single failed query is ignored; the deadline ends the wait
    [[ $state == "$last" ]] || say "$NAME is ${state:-missing}"
    last=$state
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | "") return 1 ;;
    esac
    ((SECONDS < deadline)) || fail "$NAME was not active after $WAIT_HOURS hours (WAIT_HOURS=… waits longer); it stays in the queue"
    sleep "$POLL_SECONDS"
  done
}

do_delete() {
  retry "deleting $NAME" tpus queued-resources delete "$NAME" --force --quiet
}

do_firewall() {
  run gcloud compute firewall-rules create "lcm-jax-$NETWORK" --network="$NETWORK" --allow=tcp \
    --source-tags=lcm-jax --target-tags=lcm-jax "${PROJECT[@]}" \
    || fail "the rule lcm-jax-$NETWORK could not be created; gcloud's message is above"
}

# ---- the workers

# on_workers WORKER SCRIPT: runs the script on one worker of the first slice, or on all workers of all slices.
on_workers() {
  local which=(--worker="$1" --node=0)
  # All at once: the processes of a run wait for each other, but gcloud's default is 64 workers at a time.
  [[ $1 != all ]] || which=(--worker=all --node=all --batch-size=all)
  tpus queued-resources ssh "$NAME" "${which[@]}" --command="$2"
}

# The script must print "lcm_jax: …" once on each worker. These are counted, since gcloud skips workers that it can't
# reach, and a training would wait for them.
on_every_worker() {
  [[ ! $DRY_RUN ]] || { on_workers all "$1"; return; }
  local output count
  output=$(on_workers all "$1" | tee >(cat >&2)) || return
  count=$(grep -c '^lcm_jax: ' <<< "$output") || true
  ((count == WORKERS)) || { say "$count of $WORKERS workers answered"; return 1; }
}

# Sets GENERATION, SLICES and WORKERS from the pod. A dry run uses --type and --slices instead.
look() {
  [[ ! $DRY_RUN ]] || { GENERATION=; [[ ! $TYPE ]] || read_type; return 0; }
  local nodes node type hosts
  nodes=$(tpus queued-resources describe "$NAME" --format="value(tpu.nodeSpec[].nodeId)") || return
  SLICES=0 WORKERS=0
  for node in ${nodes//;/ }; do
    read -r type hosts <<< "$(tpus tpu-vm describe "$node" --format="value(acceleratorType,networkEndpoints.len())")"
    [[ ${hosts:-} =~ ^[0-9]+$ ]] || return 1
    TYPE=${type##*/}
    SLICES=$((SLICES + 1)) WORKERS=$((WORKERS + hosts))
  done
  read_type
}

do_install() {
  local archive
  archive=$(mktemp -d)/lcm_jax.tar.gz
  # shellcheck disable=SC2064  # the path as it is now
  trap "rm -rf '${archive%/*}'" EXIT
  git -C "$HERE/.." archive --format=tar.gz --output="$archive" HEAD || fail "install copies the last commit, but $HERE is not in a git checkout with one"
  git -C "$HERE/.." diff --quiet HEAD || say "warning: uncommitted changes are not copied"
  retry "looking at $NAME" look
  retry "copying to $NAME" tpus queued-resources scp "$archive" "$NAME:lcm_jax.tar.gz" --worker=all --node=all
  # The token stays on the workers, so that a second `run`, for workers that the first did not reach, uses the same one.
  retry "installing on $NAME" on_every_worker "(umask 077; echo $(quote "$(job_token)") > job_token); $INSTALL"
}

# The text in single quotes is for the workers' shells.
# shellcheck disable=SC2016
{
  # uv installs its own Python: the image for v4 has only 3.10.
  INSTALL='set -e; rm -rf lcm_jax; mkdir lcm_jax; tar -xzf lcm_jax.tar.gz -C lcm_jax; cd lcm_jax
python3 -m pip install --quiet --user uv; uv=$HOME/.local/bin/uv
$uv venv --quiet --allow-existing --python=3.12 ../lcm_jax_venv
$uv pip install --quiet --python=../lcm_jax_venv/bin/python --constraint=constraints.txt --editable=.[tpu]
touch .installed; echo "lcm_jax: installed on $(hostname)"'

  # True if the training's process group is alive and has not written its exit code.
  RUNS='{ [ ! -f train.exit ] && kill -0 -- -$(cat train.pid 2> /dev/null || echo none) 2> /dev/null; }'
}

# Prints the state of the training on a worker.
WHAT="if $RUNS; then echo running; elif [ -f train.exit ]; then echo ended with \$(cat train.exit); else echo not started; fi"

# SIGTERM, then SIGKILL after STOP_SECONDS.
STOP="if $RUNS; then kill -TERM -- -\$(cat train.pid); for ((s = 0; s < $STOP_SECONDS; s++)); do $RUNS || break; sleep 1; done
if $RUNS; then kill -KILL -- -\$(cat train.pid); fi; fi; echo \"lcm_jax: stopped on \$(hostname)\""

do_run() {
  retry "looking at $NAME" look
  start
  say "log: launch/tpu.sh tail $NAME --zone=$ZONE; to restart after preemptions: launch/tpu.sh resume …"
}

# Has no effect on workers where the training runs, so it can be repeated when a worker could not be reached.
start() {
  local environment
  environment=$(quote JAX_PLATFORMS=tpu,cpu "JAX_COORDINATOR_PORT=$COORDINATOR_PORT" \
    "JAX_COMPILATION_CACHE_DIR=$CACHE" "LIBTPU_INIT_ARGS=$(libtpu_flags "$GENERATION" "$SLICES")")
  # JAX_PLATFORMS: without it a worker whose TPU does not start would train alone, on its CPU. A killed process leaves
  # the lock file behind, and the next one would refuse to start. The trap lets the shell survive a SIGTERM to the whole
  # group, so that it writes the training's exit code.
  retry "starting on $NAME" on_every_worker "if ! $RUNS; then cd lcm_jax || exit; rm -f ../train.exit; sudo rm -f /tmp/libtpu_lockfile
export PATH=\$HOME/lcm_jax_venv/bin:\$PATH $environment LCM_JAX_JOB_TOKEN=\$(cat ../job_token 2> /dev/null)
setsid nohup bash -c 'trap : TERM; \"\$@\"; echo \$? > ../train.exit' train $(quote "${COMMAND[@]}") >> ../train.log 2>&1 < /dev/null &
echo \$! > ../train.pid; fi; echo \"lcm_jax: training on \$(hostname)\""
}

do_status() {
  local state=ACTIVE # assumed in a dry run
  if [[ $DRY_RUN ]]; then
    tpus queued-resources list --filter="name~/queuedResources/$NAME\$" --format="value(state.state)"
  else
    state=$(pod_state) || fail "gcloud can't list the requests in $ZONE; its message is above"
    say "$NAME is ${state:-missing}"
  fi
  [[ $state != ACTIVE ]] || on_workers all "echo \"\$(hostname): \$($WHAT)\""
}

do_tail() { on_workers 0 'tail -n 100 -F train.log'; }

do_stop() { on_workers all "$STOP"; }

# ---- resume

do_resume() {
  local restarts=0 said code
  while :; do
    code=0
    # In a subshell: if the pod is preempted during setup, that counts as one more restart, not as the end.
    (bring_up) || code=$?
    if ((code == 0)); then
      [[ ! $DRY_RUN ]] || return 0
      watch
    else
      ((code != REFUSED || restarts)) || exit 1 # a request refused at first is wrong
      said="could not be started"
      sleep "$POLL_SECONDS"
    fi
    case $said in
      "ended with 0") say "the training is done; you keep the pod until launch/tpu.sh delete $NAME --zone=$ZONE"; return ;;
      "ended with 2") fail "the training ended with an error that a restart does not fix: see launch/tpu.sh tail $NAME --zone=$ZONE" ;;
      "ended with 143") fail "the training was stopped by hand and has saved; run resume again to continue" ;;
    esac
    ((restarts++ < MAX_RESTARTS)) || fail "the training $said, after $MAX_RESTARTS restarts already: see launch/tpu.sh tail $NAME --zone=$ZONE"
    say "the training $said; restart $restarts of at most $MAX_RESTARTS"
  done
}

bring_up() {
  local state
  state=$(pod_state) || fail "gcloud can't list the requests in $ZONE; its message is above"
  case $state in
    SUSPENDING | SUSPENDED | FAILED | DELETING) do_delete; state= ;;
  esac
  [[ $state ]] || ask_for_pod
  wait_for_pod || fail "$NAME was preempted or deleted before it was active"
  retry "looking at $NAME" look
  if [[ $state ]]; then
    # Processes that wait for a lost one must not keep running beside the new run.
    [[ $(on_workers 0 "$WHAT") == running ]] || on_every_worker "$STOP" || fail "the workers of $NAME can't be reached"
    on_every_worker "[ -f lcm_jax/.installed ] && echo lcm_jax: installed" || state=
  fi
  [[ $state ]] || do_install
  start
}

# Waits until the training no longer runs, and sets said: "ended with CODE", or that the pod was lost.
watch() {
  local missed=0 before=
  while :; do
    sleep "$POLL_SECONDS"
    if said=$(on_workers 0 "$WHAT"); then
      missed=0
      # A SIGTERM comes from `stop`, or from a machine that is being preempted, which won't answer a second time.
      [[ $said == running || ($said == "ended with 143" && $before != "$said") ]] || return 0
      before=$said
    elif ((++missed == TRIES)) || [[ $(pod_state) =~ ^(SUSPEND|FAILED|DELETING) ]]; then
      said="was lost with its pod"
      return 0
    fi
  done
}

main "$@"
