"""Flower's ClientApp: glue. The work is in twist_fl/federation/client.py."""

from twist_fl.federation.client import client_app

app = client_app()
