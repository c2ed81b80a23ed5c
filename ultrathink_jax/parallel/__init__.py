"""Devices, the mesh and how logical array axes are laid over it."""
