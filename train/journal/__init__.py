"""What makes a run visible: numbers, pictures and events as files, in TensorBoard and wandb, and a bar of progress."""

from .journal import ANEW, Journal, NullJournal, read_events, read_metrics

__all__ = ["ANEW", "Journal", "NullJournal", "read_events", "read_metrics"]
