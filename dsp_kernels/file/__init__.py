"""Saved networks: what a file holds, how it is written, read and checked."""
