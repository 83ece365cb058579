"""Studies: many runs that differ in a few settings, and what their records say together."""
