"""``python -m slm_pl``: the command line from any working directory."""

from slm_pl.lifeline import hold_on

if __name__ == "__main__":
    hold_on()  # before what takes seconds to import
    from slm_pl.cli import main

    main()
