"""The errors that say what the user can put right."""


class HessianFlowError(ValueError):
    """An input or a state that the user can put right; the message says how. The command prints it
    on one line."""


class AgreedError(HessianFlowError):
    """Raised on every rank alike: it is enough if rank 0 says it."""
