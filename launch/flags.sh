# shellcheck shell=bash
# What the compiler and the runtime are told on every pod and GPU: one place, with the reason for each flag.
# Flags of your own in LIBTPU_INIT_ARGS or XLA_FLAGS come after these, so they win.

# Google Cloud's firewall rule for TPU hosts opens tcp 8470, 8471, 8474, 8476 and 11211 among them. JAX from 0.8.1 on
# puts its coordinator at 8482, which is not one of these, and every process then waits until it times out.
COORDINATOR_PORT=${COORDINATOR_PORT:-8476}

# libtpu_flags GENERATION SLICES. libtpu ends the program at a flag that it does not know. Version 0.0.52 made the same
# collectives of small sharded programs with and without these; they are stated since other versions need not.
libtpu_flags() {
  local flags=(
    # Puts computation between the start and the end of each collective.
    --xla_tpu_enable_latency_hiding_scheduler=true
    # Gives collectives a start and an end to put something between.
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
  # Gradients between slices go over the data centre's network, the slowest link there is: starts their all-reduces
  # as soon as each is ready, whatever its size, and lets them run beside what is left of the backward pass.
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
    # Collectives get the stream that the GPU serves first: they start when they are ready, not when a kernel ends.
    --xla_gpu_enable_highest_priority_async_stream=true
  )
  echo "${flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
}
