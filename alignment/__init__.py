"""Learning from preferences and rewards: losses, score heads, reward functions, rollouts."""
