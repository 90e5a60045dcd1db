"""The mathematics of diffusion and consistency models as pure functions of arrays; no network, no file, no config."""
