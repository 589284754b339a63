"""Errors that the user can correct."""


class HessianFlowError(ValueError):
    """An error that the user can correct as it says; the command prints it on one line."""


class AgreedError(HessianFlowError):
    """An error that is raised alike on every rank, so that only rank 0 need report it."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where there is no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
