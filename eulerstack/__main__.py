"""`python -m eulerstack`."""

from .cli.main import main

main()
