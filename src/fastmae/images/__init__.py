"""From an image file to the middle image and its views (Sec. 3.2.3): listing, decoding, resizing, drawing views."""
