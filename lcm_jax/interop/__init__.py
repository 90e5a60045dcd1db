"""Reads and writes the file formats of other projects: diffusers folders, safetensors, LoRA, CLIP tokenizers."""
