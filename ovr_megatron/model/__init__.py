"""What model families share on Megatron-Core: layers, packed attention, context parallelism, heads."""
