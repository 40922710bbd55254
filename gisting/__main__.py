"""``python -m gisting``: the command line, for when the ``gisting`` script is not on the path.

Place in the flow: above ``cli``, which it starts.
"""

from gisting.cli import main

if __name__ == "__main__":
    main()
