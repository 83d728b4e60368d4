"""The commands of a user, `detr-backbone COMMAND`: one module for each, named after it."""
