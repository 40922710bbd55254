"""Old place of :mod:`gisting.measure`: what users imported from here still works for one release."""
