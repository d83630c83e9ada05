"""`python -m unimm.demo`."""

from unimm.demo.tour import main

main()
