"""A page that shows a model at work: images while they denoise, and the experts that draw them."""
