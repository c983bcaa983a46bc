"""What an encoder's features are worth."""
