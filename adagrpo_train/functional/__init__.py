"""The formulas: pure functions of tensors and numbers, without I/O, configuration or randomness."""
