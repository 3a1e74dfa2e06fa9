"""`python -m ldm_cli` is the same program as the console script `ldm`."""

from ldm_cli.cli import main

if __name__ == "__main__":
    main()
