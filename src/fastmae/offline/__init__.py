"""The offline stage (Sec. 3.2): images and a teacher in, a token store out; and the care of stores."""
