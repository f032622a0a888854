r"""Grade the last ``\boxed{}`` of a response against a reference answer, in killable workers."""
