"""Compiler options for programs that run only once or twice, where optimizing takes longer than it saves."""

QUICK = {  # jax.jit's compiler_options
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,  # they start MLIR and LLVM anew for each of some hundred fusions
    "xla_cpu_parallel_codegen_split_count": 1,
}
QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())  # XLA_FLAGS of a subprocess
