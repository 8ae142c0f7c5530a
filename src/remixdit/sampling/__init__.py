"""Noise => images: one denoising loop, its trajectories, files."""
