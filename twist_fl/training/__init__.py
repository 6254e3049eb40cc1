"""A worker's interval, and what the server makes of the replies."""
