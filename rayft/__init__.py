"""rayft: distributed fine-tuning on Ray that is exact, restartable and visible."""

__version__ = "0.1.0"
