"""From a masked dense network to an exact one of small grouped convolutions, and back."""
