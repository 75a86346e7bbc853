"""What was recorded: whether its files fit each other and the configuration."""
