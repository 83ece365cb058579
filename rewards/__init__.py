"""Stand-alone reward models and verifiers; nothing in here depends on the trainer."""
