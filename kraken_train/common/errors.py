"""Errors that a user can act on.

Every message names the setting or file, its value, the rule that it breaks and what would work. Entry points
(`kraken_train.common.cli`) print such an error as one message; anything else is our bug and keeps its traceback.
"""


class KrakenError(Exception):
    """Base of all errors caused by what the user gave us: settings, files, machines."""

    restart_helps = False  # whether the same command may succeed if it is only started again


class ConfigError(KrakenError):
    """A setting is unknown, of the wrong type, or breaks a rule."""


class RendezvousError(ConfigError):
    """The ranks have not found each other: a wrong address, or a faulty machine."""

    restart_helps = True


class DataError(KrakenError):
    """A source, shard, manifest or tokenizer is missing, damaged or does not fit."""


class CheckpointError(KrakenError):
    """A checkpoint or export cannot be written, found, verified, or belongs to something else."""


class OutOfMemoryError(KrakenError):
    """The machine or the GPU has no more memory."""

    restart_helps = True  # where others took it


class TrainingError(KrakenError):
    """Training cannot continue, for example because the loss is no longer finite."""


class RankLostError(TrainingError):
    """Another rank of the run has ended; its own message says why."""

    restart_helps = True


class ReplicaError(TrainingError):
    """Weights that must be equal on several ranks are not: a device has computed wrongly."""

    restart_helps = True
