"""TwIST (arXiv 2511.03983) on Flower: blueprint -> slice -> train -> aggregate -> deploy."""

__version__ = "0.1.0"
