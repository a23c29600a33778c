"""Errors between the trainer and its scorer; none of them is ever replaced by an invented score."""

from __future__ import annotations

USER_ERROR_STATUS = 2
"""Exit status of a command that ends with a UserError or an OSError; 1 is a bug, with its traceback."""


class UserError(Exception):
    """An error that the user can fix: a command prints its text, which says how, without a traceback.

    Every error that this project raises for its users is a subclass.
    """


class UsageError(UserError, ValueError):
    """Invalid arguments or options; the text says what to change."""


class PromptError(UsageError):
    """Prompts or metadata that a scorer cannot judge; the text says which ones and why."""


class BridgeError(UserError, RuntimeError):
    """The scorer process cannot be started, reached or understood, or has used up its restarts."""


class LostError(BridgeError):
    """The scorer is lost for good: its restarts or reconnections are used up, or it refuses this client."""


class DeadlineError(LostError, TimeoutError):
    """The scorer finished no batch within its deadline while one was waiting."""


class ScorerError(BridgeError):
    """The scorer raised an exception; the text contains its traceback. The batch is not retried."""


class BadScoresError(BridgeError):
    """The scorer returned a wrong number of values, NaN or infinity.

    indexes and prompts identify the images concerned (by index in the submitted batch); kept lists the files to which
    they were saved.
    """

    def __init__(self, message: str, indexes: list[int], prompts: list[str], kept: list[str]) -> None:
        super().__init__(message)
        self.indexes = indexes
        self.prompts = prompts
        self.kept = kept
