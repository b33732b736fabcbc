"""`python -m kilocopy`."""

from kilocopy.cli import main

main()
