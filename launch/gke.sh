#!/usr/bin/env bash
# Training on TPU slices (v5e, v5p, v6e) of a GKE cluster, as a JobSet: one job per slice, one pod per host. If a slice
# is preempted, all slices restart together, and the training resumes from its last checkpoint.
#
#   launch/gke.sh COMMAND NAME [OPTIONS] [-- python -m lcm_jax.train --config=… --workdir=gs://…]
#
#   create     creates the JobSet in the cluster (with --dry-run, prints its manifest)
#   tail       follows the log of the first pod
#   status     shows the JobSet and its pods
#   delete     deletes it, after a SIGTERM, so that the training saves
#
#   --type=TYPE             v5e, v5p or v6e
#   --topology=TOPOLOGY     of one slice, as in the node pools: 4x4, 8x16 (v5e, v6e), 2x2x4, 4x4x8 (v5p)
#   --slices=1              number of node pools of this kind in one run
#   --chips=4               chips per node: 4, or 8 (or 1) for the v5e and v6e machines that have them
#   --image=IMAGE           container image with lcm_jax (launch/Dockerfile builds one)
#   --spot                  uses spot nodes
#   --service-account=NAME  Kubernetes service account that may read and write the bucket (default: "default")
#   --queue=QUEUE           Kueue's local queue, if the cluster has Kueue
#   --namespace=NAMESPACE   default: kubectl's
#   --max-restarts=20       maximum number of restarts of the JobSet
#   --dry-run               prints the manifest or the commands
#   --help
#
# TRIES, RETRY_SECONDS, COORDINATOR_PORT, LIBTPU_INIT_ARGS and JAX_COMPILATION_CACHE_DIR (default: compile_cache beside
# the workdir) can be set in the environment. The cluster needs the JobSet controller, 0.6 or newer.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$HERE/common.sh"
# shellcheck source-path=SCRIPTDIR source=flags.sh
source "$HERE/flags.sh"
whole COORDINATOR_PORT "$COORDINATOR_PORT"

ACTION="" NAME="" TYPE="" TOPOLOGY="" SLICES=1 CHIPS=4 IMAGE="" SPOT="" ACCOUNT=default QUEUE="" MAX_RESTARTS=20
NAMESPACE=() COMMAND=()

main() {
  parse "$@"
  need kubectl "install it and point it at the cluster, or see --dry-run"
  "do_$ACTION"
}

parse() {
  local actions=" create tail status delete "
  while (($#)); do
    case $1 in
      --help | -h) usage; exit ;;
      --dry-run) DRY_RUN=1 ;;
      --type=*) TYPE=${1#*=} ;;
      --topology=*) TOPOLOGY=${1#*=} ;;
      --slices=*) SLICES=${1#*=}; whole --slices "$SLICES" ;;
      --chips=*) CHIPS=${1#*=}; [[ $CHIPS =~ ^[148]$ ]] || die "--chips=$CHIPS: a node has 1, 4 or 8 chips" ;;
      --image=*) IMAGE=${1#*=} ;;
      --spot) SPOT=1 ;;
      --service-account=*) ACCOUNT=${1#*=} ;;
      --queue=*) QUEUE=${1#*=} ;;
      --namespace=*) NAMESPACE=("$1") ;;
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
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "NAME='$NAME' must be lower-case letters, digits and hyphens, at most 40: launch/gke.sh $ACTION sd15 …"
  [[ $ACTION != create ]] || read_slice
}

# Sets ACCELERATOR (the node label) and NODES (of one slice).
read_slice() {
  local side chips=1 product
  case $TYPE in
    v5e) ACCELERATOR=tpu-v5-lite-podslice ;;
    v5p) ACCELERATOR=tpu-v5p-slice ;;
    v6e) ACCELERATOR=tpu-v6e-slice ;;
    "") die "--type is missing: v5e, v5p or v6e" ;;
    *) die "--type=$TYPE is unknown; use v5e, v5p or v6e" ;;
  esac
  if [[ $TYPE == v5p ]]; then
    [[ $TOPOLOGY =~ ^[1-9][0-9]*x[1-9][0-9]*x[1-9][0-9]*$ ]] || die "--topology='$TOPOLOGY' is not a slice of v5p: give three numbers, as in 2x2x4 or 4x4x8"
    for side in ${TOPOLOGY//x/ }; do
      [[ " 2x2x1 2x2x2 2x2x4 2x4x4 " == *" $TOPOLOGY "* ]] || ((side % 4 == 0)) || die "--topology=$TOPOLOGY is not a slice of v5p: use 2x2x1 2x2x2 2x2x4 2x4x4, or multiples of 4"
    done
  else
    product=" 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16 "
    [[ $TOPOLOGY && $product == *" $TOPOLOGY "* ]] || die "--topology='$TOPOLOGY' is not a slice of $TYPE; use one of$product"
  fi
  for side in ${TOPOLOGY//x/ }; do chips=$((chips * side)); done
  [[ $TYPE != v5p || $CHIPS == 4 ]] || die "--chips=$CHIPS: a node of v5p has 4 chips"
  ((chips % CHIPS == 0)) || die "--chips=$CHIPS: a slice of $TOPOLOGY has only $chips chips"
  NODES=$((chips / CHIPS))
  ((SLICES == 1 || NODES > 1)) || die "--slices=$SLICES needs slices of several nodes; --topology=$TOPOLOGY is one node of $CHIPS chips"
  [[ $IMAGE ]] || die "--image is missing: a container image with lcm_jax, as in --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/lcm_jax"
  ((${#COMMAND[@]})) || take_command
  [[ "$IMAGE$ACCOUNT$QUEUE$CACHE${LIBTPU_INIT_ARGS:-}${COMMAND[*]}" != *[[:cntrl:]]* ]] || die "the command or an option contains a line break or another control character, which a manifest can't hold"
}

cluster() { run kubectl "$@" "${NAMESPACE[@]}"; }

do_create() {
  local manifest
  manifest=$(jobset)
  if [[ $DRY_RUN ]]; then echo "$manifest"; return; fi
  kubectl get crd jobsets.jobset.x-k8s.io > /dev/null || fail "the cluster does not answer or has no JobSet controller: https://jobset.sigs.k8s.io/docs/installation"
  if cluster get jobset "$NAME" > /dev/null 2>&1; then
    fail "the JobSet $NAME already exists: launch/gke.sh delete $NAME first, or choose another name"
  fi
  # The controller's webhook is not always available.
  retry "creating the JobSet $NAME" hand_over "$manifest"
}

hand_over() { cluster apply --filename=- <<< "$1"; }

do_tail() {
  cluster logs --follow --tail=100 \
    --selector="jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

do_status() {
  cluster get jobset "$NAME" || fail "the JobSet $NAME can't be shown; kubectl's message is above"
  cluster get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --output=wide
}

do_delete() { cluster delete jobset "$NAME" --ignore-not-found; }

# Prints a YAML string. Kubernetes would expand $(NAME) in commands and variables; a second $ prevents it.
yaml() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//\$(/\$\$(}
  printf '"%s"' "$text"
}

yaml_list() {
  local word items=()
  for word; do items+=("$(yaml "$word")"); done
  local IFS=,
  echo "[${items[*]}]"
}

# `when TEST TEXT` prints TEXT if TEST is not empty: optional lines of the manifest.
when() { [[ ! $1 ]] || printf '%s\n' "$2"; }

jobset() {
  cat << MANIFEST
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
$(when "${NAMESPACE[*]}" "  namespace: $(yaml "${NAMESPACE[*]#--namespace=}")")
$(when "$QUEUE" "  labels:
    kueue.x-k8s.io/queue-name: $(yaml "$QUEUE")")
  annotations:
    # a slice is one node pool, and no two jobs share one
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    rules:
      # an error that a restart does not fix
      - name: mistake
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          parallelism: $NODES
          completions: $NODES
          backoffLimit: 0 # one failed pod ends them all: the others would only wait for it
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              serviceAccountName: $(yaml "$ACCOUNT")
              terminationGracePeriodSeconds: 300 # for the checkpoint after SIGTERM
              # direct access to the host's network card, over which slices exchange gradients
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
$(when "$SPOT" '                cloud.google.com/gke-spot: "true"')
              tolerations:
                - {key: google.com/tpu, operator: Exists, effect: NoSchedule}
$(when "$SPOT" '                - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}')
              containers:
                - name: train
                  image: $(yaml "$IMAGE")
                  command: $(yaml_list "${COMMAND[@]}")
                  env:
                    # otherwise a pod whose TPU does not start would train alone, on its CPU
                    - {name: JAX_PLATFORMS, value: "tpu,cpu"}
                    - {name: JAX_COORDINATOR_PORT, value: "$COORDINATOR_PORT"}
                    - {name: JAX_COMPILATION_CACHE_DIR, value: $(yaml "$CACHE")}
                    - {name: LIBTPU_INIT_ARGS, value: $(yaml "$(libtpu_flags "$TYPE" "$SLICES")")}
                    - {name: LCM_JAX_JOB_TOKEN, value: $(yaml "$(job_token)")}
                  ports:
                    - {containerPort: $COORDINATOR_PORT, name: coordinator}
                  resources:
                    requests: {google.com/tpu: $CHIPS}
                    limits: {google.com/tpu: $CHIPS}
MANIFEST
}

main "$@"
