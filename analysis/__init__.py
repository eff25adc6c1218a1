"""Tables and figures from run folders. Imports `ray_subnets`, never Ray."""
