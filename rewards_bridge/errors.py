"""What can go wrong between the trainer and its scorer; nothing of it is answered by a made-up score."""

from __future__ import annotations

USER_ERROR_STATUS = 2
"""Exit status of a command that ends with a UserError or an OSError; 1 is a bug, with its traceback."""


class UserError(Exception):
    """What its user can put right: a command shows it in a line that says how, without a traceback.

    Every error of this project that is raised for its users is one.
    """


class UsageError(UserError, ValueError):
    """Arguments or options that cannot work; the text says what to change."""


class PromptError(UsageError):
    """Prompts or their metadata that a scorer cannot judge; the text says which, and why."""


class BridgeError(UserError, RuntimeError):
    """The scorer process cannot be started, reached or understood, or died more often than it may."""


class LostError(BridgeError):
    """The scorer cannot be reached any more: its restarts or reconnections are used up, or it refuses this client."""


class DeadlineError(LostError, TimeoutError):
    """The scorer finished nothing within its deadline while a batch was waiting there."""


class ScorerError(BridgeError):
    """The scorer raised; the text holds its own traceback. The batch is not tried again."""


class BadScoresError(BridgeError):
    """The scorer answered with wrong counts, NaN or infinity.

    indexes and prompts are the images concerned (their index in the submitted batch), kept the files they were kept in.
    """

    def __init__(self, message: str, indexes: list[int], prompts: list[str], kept: list[str]) -> None:
        super().__init__(message)
        self.indexes = indexes
        self.prompts = prompts
        self.kept = kept
