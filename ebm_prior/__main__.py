"""`python -m ebm_prior` is the `ebm-prior` command."""

from ebm_prior.cli import main

main(prog_name="ebm-prior")
