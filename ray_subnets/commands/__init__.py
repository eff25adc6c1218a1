"""What `launch.py` offers, a file for each kind of command, and the options that they share."""
