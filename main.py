"""Command line of slm_pl: ``python main.py fit|validate|test|predict|prune|compare --help``."""

from slm_pl.cli import main

if __name__ == "__main__":
    main()
