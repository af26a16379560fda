"""Checkpoints for other runtimes, written from the config alone and run beside ours before they are handed out."""

from .export import ENGINES, EngineReport, engine_room, export_to_engine


__all__ = ["ENGINES", "EngineReport", "engine_room", "export_to_engine"]
