"""`train(config)`: start or resume, step, record."""
