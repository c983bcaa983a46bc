"""`python -m fastmae` is `fastmae`."""

from fastmae.cli import main

main()
