"""What frozen features are worth: embedding, nearest neighbours, logistic regression."""
