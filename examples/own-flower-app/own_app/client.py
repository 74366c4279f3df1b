"""The ClientApp of fedmitr-flwr as it is; put your own here if you train differently."""

from client_app.app import app

__all__ = ["app"]
