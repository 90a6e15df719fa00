"""Data of any kind as a ``LightningDataModule``: arrays, folders of images, loaders that resume."""
