"""`python -m tilefold` is the command line `tilefold`."""

from .cli import main

main()
