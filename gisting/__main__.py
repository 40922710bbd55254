"""``python -m gisting``: the command line, where its script is not on the path.

Place in the flow: above ``cli``, which it starts. Knows nothing else.
"""

from gisting.cli import main

if __name__ == "__main__":
    main()
