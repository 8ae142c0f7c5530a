"""Images against real ones, experts against intervals."""
