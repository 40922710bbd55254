"""``python -m gisting``: the command line, where its script is not on the path."""

from gisting.cli import main

if __name__ == "__main__":
    main()
