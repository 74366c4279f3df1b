"""Run the command line with ``python -m fedmitr_flwr.cli``, where ``fedmitr`` is not on the path."""

from fedmitr_flwr.cli import main

main()
