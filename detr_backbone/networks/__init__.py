"""Any network by name: how it is built, its stages and geometry, its normalisation, weights and input channels."""
