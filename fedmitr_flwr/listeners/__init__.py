"""Listeners of an `observe.Observer`: one file for each way of keeping what a run tells."""

from fedmitr_flwr.listeners.jsonl import JsonLines, read_events
from fedmitr_flwr.listeners.keeper import Keeper
from fedmitr_flwr.listeners.tensorboard import TensorBoard, boards, check_tensorboard

__all__ = ["JsonLines", "Keeper", "TensorBoard", "boards", "check_tensorboard", "read_events"]
