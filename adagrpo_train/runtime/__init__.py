"""Engine, policy, checkpoints and noise: what a run stands on."""
