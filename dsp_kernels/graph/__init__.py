"""A model as a graph of known operations."""
