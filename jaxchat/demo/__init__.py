"""The demo's data, generated from a seed: prose, conversations and held-out prompts."""

from jaxchat.demo.world import KINDS, Prompt, Turn, World
from jaxchat.demo.write import write_world

__all__ = ["KINDS", "Prompt", "Turn", "World", "write_world"]
