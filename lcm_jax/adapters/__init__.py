"""LoRA: target modules, adapter parameters, and layers with a low-rank branch."""
