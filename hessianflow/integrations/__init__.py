"""Curvature and growing batches in the trainers of others: Lightning, transformers, accelerate.

Each module needs its host, which the extra of the same name installs: import it by name, such as
`from hessianflow.integrations.lightning import AdaptiveBatch`. Nothing here is imported before.
"""
