"""LoRA files: the dialects of diffusers, peft and kohya's scripts, read and written."""
