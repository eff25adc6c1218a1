"""Policies: environments, PPO, ensembles of a policy, their runs and sweeps."""
