"""What a recorded iteration would have been under another configuration."""
