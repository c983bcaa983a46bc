"""The offline stage (Sec. 3.2): the teacher runs once over every image, and a token store keeps its patch features."""
