"""For programs that run once or twice: most of their time would go into compiling them well."""

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # jax.jit's compiler_options
