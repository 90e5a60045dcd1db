"""The only room that knows the file formats of other projects: diffusers folders, safetensors, CLIP tokenizers."""
