"""Learn, beside ordinary training, which filters of a layer form a group."""
