"""The errors a user can cause and fix, each said in one sentence.

The command line prints the sentence and leaves with the class's ``exit_code``; no other
exception is expected to reach a user, so anything else is a bug and keeps its traceback.
"""


class SpecMoEOffError(Exception):
    """Base of every error that names its own remedy."""

    exit_code = 1


class InvalidInputError(SpecMoEOffError, ValueError):
    """An argument, prompt or option has a value that cannot be used; the message quotes it."""

    exit_code = 2


class CheckpointError(SpecMoEOffError, ValueError):
    """A checkpoint cannot be used; the message names the file and the tensor or field."""

    exit_code = 2


class DoesNotFitError(SpecMoEOffError, ValueError):
    """The memory budget is too small; the message has the arithmetic and what would do."""

    exit_code = 3


class StreamError(SpecMoEOffError, RuntimeError):
    """Reading weights failed while running; the message names the file and the tensor."""

    exit_code = 1


class PlanError(SpecMoEOffError, ValueError):
    """A plan of a step cannot be run as it is; the message names the op."""

    exit_code = 2


class OpError(SpecMoEOffError, RuntimeError):
    """An op of a step failed; the message names it and its cause is chained."""

    exit_code = 1
