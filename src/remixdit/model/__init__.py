"""`RemixDiT` = diffusion + mixture: what it is, where it lies on disk, what it costs."""
