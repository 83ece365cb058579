"""From images to rewards."""
