"""What people read of runs and evaluations."""
