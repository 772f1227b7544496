"""Reinforcement learning: sample answers, reward them, and train on them with a policy-gradient loss."""
