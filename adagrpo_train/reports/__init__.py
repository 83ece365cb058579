"""Self-contained HTML pages about runs and studies, and the comparison of a run with a reference curve."""
