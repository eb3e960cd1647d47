"""`python -m ctp_cli` is `ctp`."""

from ctp_cli.app import main

main()
