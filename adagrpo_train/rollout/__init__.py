"""From noise to images, with a record of the stochastic steps."""
