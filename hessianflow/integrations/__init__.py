"""Curvature and growing batches in other trainers: Lightning, transformers and accelerate.

Each module needs its host, which the extra of the same name installs. Import the module by name,
as in `from hessianflow.integrations.lightning import AdaptiveBatch`; no host is imported before.
"""
