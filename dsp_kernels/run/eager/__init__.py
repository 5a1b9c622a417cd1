"""Plain PyTorch, on any device."""
