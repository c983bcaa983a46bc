"""The student (Sec. 3.2.4): encoder, decoder and loss; and its targets, with guidance normalisation (Sec. 4.2.2)."""
