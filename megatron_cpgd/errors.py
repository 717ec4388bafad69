"""Errors that a caller may catch, each also a standard-library error."""

USER_ERROR = 2
"""Exit code of the command line for a UserError."""


class UserError(ValueError):
    """The user's input is wrong: the command line prints only the message, exit code 2."""


class ConfigError(UserError):
    """One or more settings are wrong; the message lists all of them."""


class DataError(UserError):
    """A data set, a tokenizer or a prompt cannot be used."""


class ConversionError(UserError):
    """A checkpoint is missing, damaged, or does not fit the model."""


class RolloutError(RuntimeError):
    """The engine process failed, died, or did not answer in time."""


class WeightSyncError(RuntimeError):
    """The engine does not hold the weights that the policy has sent."""


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite; the state was saved."""
