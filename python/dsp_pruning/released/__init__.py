"""The networks that the authors of the paper published."""
