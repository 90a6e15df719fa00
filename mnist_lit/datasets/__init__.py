"""The example's data: where it comes from and how its files are read. Bring your own, and delete this."""
