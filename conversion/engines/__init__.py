"""Checkpoints for other runtimes, written from the config alone and run beside ours before they are handed out."""

from .export import ENGINES, EngineReport, export_to_engine


__all__ = ["ENGINES", "EngineReport", "export_to_engine"]
