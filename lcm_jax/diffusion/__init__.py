"""The mathematics of diffusion and of consistency models, as pure functions of arrays. No network is known here.

Symbols are the papers': z_t = alpha_t x0 + sigma_t eps; lambda = log(alpha / sigma); w = guidance_scale - 1; psi, a
solver's step from t down to s; f, the consistency function; k, the timesteps that psi crosses; N, the number of steps
of the trained grid.
"""
