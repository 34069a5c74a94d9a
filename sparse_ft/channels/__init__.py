"""Channels of a model: which belong together, running a model with a part of them, and taking others out for good."""

from .analysis import analyze_channels
from .removal import (
    RemovalReport,
    channels_removed,
    dead_units,
    quiet_units,
    remove_channels,
    restore_channels,
    silence,
)
from .subnetwork import SubNetwork
from .units import FIXED, ChannelError, Channels, Place

__all__ = [
    "FIXED",
    "ChannelError",
    "Channels",
    "Place",
    "RemovalReport",
    "SubNetwork",
    "analyze_channels",
    "channels_removed",
    "dead_units",
    "quiet_units",
    "remove_channels",
    "restore_channels",
    "silence",
]
