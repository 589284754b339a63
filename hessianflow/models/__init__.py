"""The networks of the large-batch papers and decoders for language, by name, with their sizes."""

from hessianflow.models.catalogue import create, names
from hessianflow.models.counting import count_multiply_adds, count_parameters

__all__ = ["count_multiply_adds", "count_parameters", "create", "names"]
