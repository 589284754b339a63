"""Networks of the large-batch papers, by name."""

from hessianflow.models.catalogue import create, names

__all__ = ["create", "names"]
