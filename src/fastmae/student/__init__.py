"""The student (Sec. 3.2.4): encoder, decoder, loss, and what it predicts."""
