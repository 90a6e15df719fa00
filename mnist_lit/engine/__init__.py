"""The lower floor: carries any ``LightningModule`` and any ``LightningDataModule``, and knows neither.

Nothing in here imports from the floor above; ``lint-imports`` checks that.
"""

PROJECT = __name__.partition(".")[0]  # the package that this engine is part of, for messages and commands
