"""Reads and writes LoRA files in the formats of diffusers, peft and kohya's scripts."""
