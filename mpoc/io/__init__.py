"""Checkpoints, safetensors files and Hugging Face directories: checked when read, written whole."""
