"""What an iteration did, in files that outlive the run: README.md describes them."""
