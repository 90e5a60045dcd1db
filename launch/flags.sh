# shellcheck shell=bash
# Compiler and runtime flags for all pods and GPUs, with the reason for each.
# Your own flags in LIBTPU_INIT_ARGS or XLA_FLAGS come after these, so they take precedence.

# Google Cloud's firewall rule for TPU hosts opens tcp 8470, 8471, 8474, 8476 and 11211 among them. JAX from 0.8.1 on
# puts its coordinator at 8482, which is closed, so every process would wait until it times out.
COORDINATOR_PORT=${COORDINATOR_PORT:-8476}

# libtpu_flags GENERATION SLICES. libtpu ends the program at an unknown flag. Version 0.0.52 compiled the same
# collectives for small sharded programs with and without these; they are set because other versions may not.
libtpu_flags() {
  local flags=(
    # Puts computation between the start and the end of each collective.
    --xla_tpu_enable_latency_hiding_scheduler=true
    # Splits collectives into a start and an end, between which computation can run.
    --xla_enable_async_all_gather=true
    --xla_enable_async_all_reduce=true
    --xla_enable_async_collective_permute=true
  )
  # Async collective fusion: runs a collective's steps inside the matrix product beside it. For v5e alone: for v4 and v5p
  # libtpu 0.0.42.1 fuses nothing with it, and 0.0.52 refuses to compile, also for v6e ("incorrect results, hang").
  [[ $1 != v5e ]] || flags+=(
    --xla_tpu_enable_async_collective_fusion=true
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
    --xla_tpu_enable_async_collective_fusion_multiple_steps=true
    --xla_tpu_overlap_compute_collective_tc=true
  )
  # Gradients between slices use the data centre's network, the slowest link: starts each all-reduce as soon as its
  # input is ready, whatever its size, and overlaps it with the rest of the backward pass.
  (($2 == 1)) || flags+=(
    --xla_tpu_enable_data_parallel_all_reduce_opt=true
    --xla_tpu_data_parallel_opt_different_sized_ops=true
  )
  echo "${flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
}

gpu_flags() {
  local flags=(
    # Puts computation between the start and the end of each collective. Off by default on GPUs.
    --xla_gpu_enable_latency_hiding_scheduler=true
    # Runs collectives on the GPU's highest-priority stream: they start when they are ready, not when a kernel ends.
    --xla_gpu_enable_highest_priority_async_stream=true
  )
  echo "${flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
}
