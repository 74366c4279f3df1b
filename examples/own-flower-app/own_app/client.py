"""The ClientApp of fedmitr-flwr, unchanged. Replace it by your own if you train differently."""

from client_app.app import app

__all__ = ["app"]
