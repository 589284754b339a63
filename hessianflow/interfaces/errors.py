"""Errors that the user can correct."""


class HessianFlowError(ValueError):
    """An error that the user can correct as it says; the command prints it on one line."""


class AgreedError(HessianFlowError):
    """An error that is raised alike on every rank, so that only rank 0 need report it."""
