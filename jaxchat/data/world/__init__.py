"""The demo's small world, generated from a seed: prose for base, conversations for mid and SFT, held-out prompts."""

from jaxchat.data.world.world import KINDS, Prompt, Turn, World
from jaxchat.data.world.write import write_world

__all__ = ["KINDS", "Prompt", "Turn", "World", "write_world"]
