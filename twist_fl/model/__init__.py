"""Hugging Face's models, sliced, masked or whole."""
