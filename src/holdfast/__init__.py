"""holdfast: hyperparameter and benchmark searches that survive anything, on Prefect 3."""

__version__ = "0.1.0"
