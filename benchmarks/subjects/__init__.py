"""What is measured: networks, and the forms in which each of them can run."""
