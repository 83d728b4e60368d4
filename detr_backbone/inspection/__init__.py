"""What every layer of a network gives, as a table."""
