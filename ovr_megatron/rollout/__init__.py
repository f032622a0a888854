"""vLLM in the trainer's own process: live weights in, sampled tokens and their log-probabilities out."""

import logging
import os

# Read when vLLM is first imported; at its own default it writes dozens of lines for each start.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())  # for what it says before it has read it
