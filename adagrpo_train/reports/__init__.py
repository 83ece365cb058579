"""What people read of runs, studies and evaluations: pages, tables, pictures, and comparisons of two."""
