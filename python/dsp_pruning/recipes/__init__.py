"""The three trainings of the method and the demo, as thin functions over the library."""
