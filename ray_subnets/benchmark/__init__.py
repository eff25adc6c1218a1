"""Every method under one budget: what is run, its cells, tables and page."""
