"""`python -m adagrpo_train`: the same as `adagrpo-train`."""

import sys

from adagrpo_train.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
