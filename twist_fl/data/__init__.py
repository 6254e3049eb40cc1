"""Text -> tokens -> windows -> shards."""
