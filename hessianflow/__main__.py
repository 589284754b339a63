"""`python -m hessianflow` is the `hessianflow` command."""

import sys

from hessianflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
