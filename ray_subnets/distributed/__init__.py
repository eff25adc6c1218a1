"""The only place that imports Ray. Everything below runs without it."""
