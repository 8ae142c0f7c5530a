"""K bases mixed into N experts, of any nn.Module. It never hears of diffusion."""
