"""Run ``python -m fedmitr_flwr.cli``, for systems without the command ``fedmitr`` on the path."""

from fedmitr_flwr.cli import main

main()
