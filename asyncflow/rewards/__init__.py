"""Reward functions: those that come with AsyncFlow, and those that users bring."""

from asyncflow.rewards.functions import BUILT_IN, RewardFunction
from asyncflow.rewards.loader import load_reward
from asyncflow.rewards.reward import Reward, RewardFailure, RewardInput, RewardOutput

__all__ = ["BUILT_IN", "Reward", "RewardFailure", "RewardFunction", "RewardInput", "RewardOutput", "load_reward"]
