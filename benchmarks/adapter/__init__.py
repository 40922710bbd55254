"""The adapter that comes with the library: its data, its training and its evaluation, as one command."""
