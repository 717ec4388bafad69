"""Errors that a caller may catch, each also a standard-library error."""

USER_ERROR = 2
"""Exit code of the command line for a UserError."""
RUN_ERROR = 3
"""Exit code of the command line for a RunError."""
STOPPED = 200
"""Exit code of the command line for a RunStopped since whose start a checkpoint was written: the
same command gets further. No other program has it by chance."""


class UserError(ValueError):
    """The user's input is wrong: the command line prints only the message, exit code 2."""


class ConfigError(UserError):
    """One or more settings are wrong; the message lists all of them."""


class DataError(UserError):
    """A data set, a tokenizer or a prompt cannot be used."""


class ConversionError(UserError):
    """A checkpoint is missing, damaged, or does not fit the model."""


class RunError(RuntimeError):
    """The run cannot go on, by no defect of this code: only the message is shown, exit code 3."""


class RunStopped(Exception):
    """The run was asked to stop and can be resumed; the log says from where."""


class RolloutError(RunError):
    """The engine process failed, died, or did not answer in time."""


class WeightSyncError(RunError):
    """The engine does not hold the weights that the policy has sent."""


class RewardError(RunError):
    """A reward function fails on everything: training on its zeros would be silent damage."""


class TrainingDivergedError(RunError):
    """The run has collapsed, or too many steps in a row had a loss or gradient of nan."""
