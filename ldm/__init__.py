"""Latent diffusion from scratch: original weights, every sampler, one small readable library."""
