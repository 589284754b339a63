"""The names of the files and folders in a run directory."""

CONFIG = "config.json"
HISTORY = "history.jsonl"
SUMMARY = "summary.json"
SETTINGS = "settings.yaml"
SPECTRUM = "spectrum.json"
ROBUSTNESS = "robustness.json"
LOCK = ".hessianflow-lock"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
LAST = "last.pt"  # the newest checkpoint
PREVIOUS = "previous.pt"  # the one before it
BEST = "best.pt"  # the one of the best accuracy
SET_ASIDE = "last.damaged"
