"""What is known of a run before it is started: whether it will work, and what it takes."""
