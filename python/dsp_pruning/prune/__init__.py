"""Prune input channels per group, and filters, to a share of the multiply-adds."""
