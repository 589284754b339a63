"""The networks of the large-batch papers, by name, with their published sizes."""

from hessianflow.models.catalogue import create, names
from hessianflow.models.counting import count_multiply_adds, count_parameters

__all__ = ["count_multiply_adds", "count_parameters", "create", "names"]
