"""Compiler options for programs that run only once or twice, where optimizing takes longer than it saves."""

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # jax.jit's compiler_options
QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())  # XLA_FLAGS of a subprocess
