"""LoRA: which modules are adapted, and how adapters run beside frozen weights."""
