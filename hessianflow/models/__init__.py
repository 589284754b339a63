"""Networks of the large-batch papers, by name."""

from hessianflow.models.catalogue import create, names
from hessianflow.models.counting import count_multiply_adds, count_parameters

__all__ = ["count_multiply_adds", "count_parameters", "create", "names"]
