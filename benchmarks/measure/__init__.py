"""How a number is taken: time, memory, accuracy, peaks of the machine."""
