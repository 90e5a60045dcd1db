"""Sampling images from prompts with the model of a folder."""
