"""How a number is taken: times, samples, profiles, peaks and floors of the machine."""
