"""What may be asked over HTTP, and the web side of it."""
