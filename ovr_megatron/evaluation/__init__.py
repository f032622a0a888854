"""Evaluate models on problem sets, during and after training: generate by vLLM, grade, score with intervals."""
