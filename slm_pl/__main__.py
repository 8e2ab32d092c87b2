"""``python -m slm_pl``: the command line from any working directory."""

from slm_pl.cli import main

if __name__ == "__main__":
    main()
