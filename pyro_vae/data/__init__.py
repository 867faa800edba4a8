"""What comes in: rows of any container, named data sets, files, and the checks of arguments."""
