"""What the rewards with an image tower share. Nothing in here imports torch before it is called."""
