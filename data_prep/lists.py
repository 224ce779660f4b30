"""Names shared by the commands that make and read lists of images."""

CLASSES_FILE = "classes.txt"
