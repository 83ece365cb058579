"""Base algorithms as three choices: transition, plan, objective; and the advantages."""
