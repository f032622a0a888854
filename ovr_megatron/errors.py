"""Errors that a user can put right: one family, so that a command needs no list of its libraries' errors."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user; the message names the file, line and field, and what to change.

    A command ends with this sentence and exit code 2 (`ovr_megatron.runtime.command.run_command`).
    """
