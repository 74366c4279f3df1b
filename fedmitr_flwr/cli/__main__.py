"""``python -m fedmitr_flwr.cli``, where the ``fedmitr`` command is not on the path."""

from fedmitr_flwr.cli import main

main()
