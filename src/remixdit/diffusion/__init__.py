"""A plain DiT, noise and loss, intervals. It never hears of mixing."""
