"""PPO with verifiable rewards: equations, batches, curriculum (paper, section 3.2; Open-Reasoner-Zero)."""
