"""Release: a run as a folder for others, with an index of everything, and its verification."""
