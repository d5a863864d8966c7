"""Parts of tools/doctor.py: what is read from the machine, and the part that needs torch."""
