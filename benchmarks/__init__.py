"""Measuring: engines side by side in one process, each checked before it is timed."""
