"""What a user sees of a run: write metrics; no computing."""
