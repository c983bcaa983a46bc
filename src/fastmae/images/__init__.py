"""From an image file to the middle image (Sec. 3.2.3): listing, decoding, resizing."""
