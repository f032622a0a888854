"""`UserError`, the base of all errors that a user can put right: a command catches this class alone."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user; the message names the file, line and field, and what to change.

    A command ends with this sentence and exit code 2 (`ovr_megatron.runtime.command.run_command`).
    """
