"""The native CPU kernels of csrc/cpu."""
