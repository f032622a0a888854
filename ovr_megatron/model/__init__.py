"""Qwen2.5-VL on Megatron-Core: vision tower, language model, heads."""
