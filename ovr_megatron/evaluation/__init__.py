"""Models on problem sets: asked by vLLM, graded, scored with intervals; after training and during it."""
