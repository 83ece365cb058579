"""Which prompts to train on."""
