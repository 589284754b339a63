"""The names of what a run directory holds."""

CONFIG, HISTORY, SUMMARY, SETTINGS = "config.json", "history.jsonl", "summary.json", "settings.yaml"
SPECTRUM, ROBUSTNESS = "spectrum.json", "robustness.json"
CHECKPOINTS, PLOTS, TENSORBOARD = "checkpoints", "plots", "tensorboard"
LAST, PREVIOUS, BEST, SET_ASIDE = "last.pt", "previous.pt", "best.pt", "last.damaged"
"""Checkpoints: the newest, the one before it, that of the best accuracy, and one that was
damaged."""
LOCK = ".hessianflow-lock"
