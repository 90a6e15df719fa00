"""A PyTorch Lightning project."""
