"""The first design of the mixture, on its way out."""
