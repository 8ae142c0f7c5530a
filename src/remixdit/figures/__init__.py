"""Arrays => figures, grids of images, one HTML file."""
