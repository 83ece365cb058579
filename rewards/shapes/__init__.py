"""The shapes task: a caption grammar, a renderer of ground truth and a programmatic verifier."""
