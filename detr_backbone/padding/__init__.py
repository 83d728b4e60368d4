"""Exact padding: an image's features never depend on who shares its batch."""
