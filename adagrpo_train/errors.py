"""Errors a user can act on: each message names what is wrong and the remedy."""


class AdaGRPOError(Exception):
    """Base of every error that the command line reports without a traceback."""

    on_every_rank = False
    """True: all processes raised this error, so that one report is enough."""


class ConfigError(AdaGRPOError):
    """A setting is unknown, missing or inconsistent; raised before any work is done."""


class PromptError(AdaGRPOError):
    """The prompt file cannot be used."""


class RewardError(AdaGRPOError):
    """A reward is missing, not finite or of the wrong shape. A failed reward never becomes a number."""


class StoppedError(AdaGRPOError):
    """The run was asked to stop while it waited for something outside itself. Not a fault: the state is saved."""


class TrainingError(AdaGRPOError):
    """Training produced a value that must not reach the weights, such as a non-finite loss."""


class CheckpointError(AdaGRPOError):
    """A checkpoint is absent, damaged or belongs to another configuration."""


class PreflightError(AdaGRPOError):
    """Checks made before a run found that it should not be started."""
