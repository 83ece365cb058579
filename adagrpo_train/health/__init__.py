"""Whether a run is healthy: diversity of its groups, its level, reward hacking, and its best checkpoint."""
