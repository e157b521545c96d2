"""`python -m nemotron`."""

from nemotron.cli import main

if __name__ == "__main__":
    main()
