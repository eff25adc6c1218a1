"""`python -m ray_subnets`: the command line."""

import sys

from ray_subnets.launch import main

if __name__ == "__main__":
    sys.exit(main())
