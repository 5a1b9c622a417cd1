"""A fused network as data, and how it is made: plan, fuse, swap."""
