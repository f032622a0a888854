"""Weights: the table between Megatron's and Hugging Face's parameters, safetensors folders, averaging."""
