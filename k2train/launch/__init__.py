"""Launching the processes of one machine and supervising them."""
