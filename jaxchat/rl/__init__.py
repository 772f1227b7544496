"""Reinforcement learning: answers are sampled, rewarded, and made likelier or less likely by the one loss."""
